"""What every matching asks of its inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive.arguments import FEATURE_DTYPES, described

#: Shorter vectors are divided by that, as `F.normalize` does.
SMALLEST_NORM = 1e-12


def check_metric(metric: object) -> None:
    """Raise unless it is a floating point tensor [B, N, C]."""
    if not isinstance(metric, Tensor) or metric.dtype not in FEATURE_DTYPES:
        given = metric.dtype if isinstance(metric, Tensor) else type(metric).__name__
        raise TypeError(f"metric is {given}: expected a float16, bfloat16, float32 or float64 tensor")
    if metric.dim() != 3:
        raise ValueError(f"metric has shape {list(metric.shape)}: expected [batch, tokens, channels]")


def check_number(name: str, value: object, least: int = 0) -> None:
    """Raise unless it is a whole number of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")


def protected_mask(protected: int | Tensor, metric: Tensor) -> Tensor:
    """bool [B, N], True for tokens that are never merged: so many first ones, or those of a mask [N] or [B, N].

    Raises:
        ValueError: a mask of another shape or dtype.
    """
    batch, tokens, _ = metric.shape
    if isinstance(protected, int):
        check_number("protected", protected)
        return (torch.arange(tokens, device=metric.device) < protected).expand(batch, -1)
    if protected.dtype != torch.bool or protected.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"protected is {described(protected)}: expected a number, or a bool tensor [{tokens}] or {[batch, tokens]}"
        )
    return protected.expand(batch, -1)


def normalized(metric: Tensor) -> Tensor:
    """Unit vectors, in float32 at least: similarities are cosines, and ties of rounded ones would be no ties."""
    return F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1, eps=SMALLEST_NORM)
