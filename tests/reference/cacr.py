"""CACR (arXiv:2105.03746): softmax-weighted distances of the positives, and of the negatives."""

from __future__ import annotations

import torch
from torch import Tensor


def cacr(x: Tensor, y: Tensor, ids: list[int], tau_pos: float, tau_neg: float, alpha: float, beta: float) -> Tensor:
    """[N]: the mean of both directions."""
    total = 0.0
    for queries, keys in ((x, y), (y, x)):
        terms = []
        for i, query in enumerate(queries):
            distances = (query - keys).square().sum(1)
            far = distances[[k for k in range(len(ids)) if ids[k] == ids[i]]]
            term = alpha * ((tau_pos * far).softmax(0) * far).sum()
            close = distances[[j for j in range(len(ids)) if ids[j] != ids[i]]]
            if len(close):
                term = term - beta * ((-tau_neg * close).softmax(0) * close).sum()
            terms.append(term)
        total = total + torch.stack(terms) / 2
    return total
