"""Alignment and uniformity (arXiv:2005.10242) of two modalities, and across them (arXiv:2405.18570)."""

from __future__ import annotations

import torch
from torch import Tensor


def alignment(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum(1).mean()


def uniformity(x: Tensor, y: Tensor, t: float) -> Tensor:
    """log mean_{i != j} exp(-t |x_i - y_j|^2); y is x within a modality."""
    near = (-t * (x[:, None] - y).square().sum(2)).exp()
    return near[~torch.eye(len(x), dtype=torch.bool)].mean().log()
