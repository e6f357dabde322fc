"""CWCL (arXiv:2309.14580), with the matrix of weights."""

from __future__ import annotations

from torch import Tensor


def cwcl(scores: Tensor, locked: Tensor) -> Tensor:
    """[N]: of row i the weighted term, and of column i the one-hot term; locked [N, D'], unit vectors."""
    weights = locked @ locked.T / 2 + 0.5
    weighted = -(weights * scores.log_softmax(1)).sum(1) / weights.sum(1)
    return weighted - scores.log_softmax(0).diagonal()
