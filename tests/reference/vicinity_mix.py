"""BiMixCo (arXiv:2305.18274) and M3CoL (arXiv:2409.17777): cross-entropy against two partners each."""

from __future__ import annotations

import torch
from torch import Tensor


def vicinity_mix(scores: Tensor, perm: list[int], lam: list[float]) -> Tensor:
    """[N]: of row i and of column i, the mean."""
    targets = torch.zeros_like(scores)
    for i, (partner, share) in enumerate(zip(perm, lam)):
        targets[i, i] += share
        targets[i, partner] += 1 - share
    return -((targets * scores.log_softmax(1)).sum(1) + (targets * scores.log_softmax(0)).sum(0)) / 2
