"""CWCL (arXiv:2309.14580), with the matrix of weights."""

from __future__ import annotations

import torch
from torch import Tensor


def cwcl(scores: Tensor, locked: Tensor) -> Tensor:
    """[N]: of row i the weighted term, and of column i the one-hot term; locked [N, D'], unit vectors."""
    rows = []
    for i in range(len(scores)):
        weights = torch.stack([locked[i] @ locked[j] / 2 + 0.5 for j in range(len(scores))])
        rows.append(-(weights * scores[i].log_softmax(0)).sum() / weights.sum())
    return torch.stack(rows) - scores.log_softmax(0).diagonal()
