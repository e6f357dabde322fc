"""DCL and DCLW, from the paper's formulas (arXiv:2110.06848)."""

from __future__ import annotations

import torch
from torch import Tensor


def weights(cosines: Tensor, sigma: float) -> Tensor:
    """2 - exp(c_i / sigma) / mean_k exp(c_k / sigma), of the pairs' own cosines [n]."""
    exponentials = (cosines / sigma).exp()
    return 2 - exponentials / exponentials.mean()


def terms(scores: Tensor, weights: Tensor | float = 1.0, within: Tensor | None = None) -> Tensor:
    """-w_i S_ii + log sum_{j != i} exp(S_ij) of each row; `within` [n, n] are scores of more negatives j != i."""
    found = []
    for i in range(len(scores)):
        others = [j for j in range(len(scores)) if j != i]
        negatives = scores[i, others] if within is None else torch.cat([scores[i, others], within[i, others]])
        weight = weights[i] if isinstance(weights, Tensor) else weights
        found.append(negatives.exp().sum().log() - weight * scores[i, i] if len(others) else 0 * scores[i, i])
    return torch.stack(found)
