"""SDM of IRRA (arXiv:2303.12501): KL between the softmax of the scores and the normalised label matches."""

from __future__ import annotations

import torch
from torch import Tensor


def sdm(scores: Tensor, ids: list[int], eps: float = 1e-8) -> Tensor:
    """[N]: both directions added up."""
    matches = torch.tensor([[float(a == b) for b in ids] for a in ids], dtype=scores.dtype)
    true = matches / matches.sum(1, keepdim=True)
    total = 0.0
    for student in (scores, scores.T):
        predicted = student.softmax(1)
        total = total + (predicted * (student.log_softmax(1) - torch.log(true + eps))).sum(1)
    return total
