"""The sigmoid loss with several positives, from SigLIP's formula (arXiv:2303.15343)."""

from __future__ import annotations

import torch
from torch import Tensor


def terms(scores: Tensor, same: Tensor) -> Tensor:
    """sum_j log(1 + exp(-z_ij S_ij)) of each row, [n], z = +1 where `same` [n, m]."""
    signs = same.to(scores.dtype) * 2 - 1
    return torch.logaddexp(torch.zeros_like(scores), -signs * scores).sum(1)
