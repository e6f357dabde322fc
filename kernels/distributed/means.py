"""The mean of a loss over ranks, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import Shards
from .traffic import record_all_reduce


def global_mean(terms: Tensor, shards: Shards, *, reduction: str = "mean", local: bool = False) -> Tensor:
    """Reduce a loss's terms, one for each of this rank's rows, over the whole batch.

    With reduction="mean", L_r = W / N_global * sum(terms); with "sum", L_r = W * sum(terms).

    Args:
        terms: [n_r], differentiable; or a scalar, their sum times `shards.weight(reduction)`.
        shards: how the batch lies over the ranks.
        reduction: "mean" or "sum"; "none" returns the terms as they are.
        local: return L_r itself instead of the global value with the gradient of L_r.

    Returns:
        A scalar: L, the mean of L_r over ranks, bit for bit the same on every rank (or L_r). The mean over an
        empty batch is NaN, as everywhere in torch.
    """
    if reduction == "none":
        return terms
    share = terms.sum() * shards.weight(reduction) if terms.dim() else terms
    if reduction == "mean" and shards.total == 0:
        share = share + torch.nan
    if local or shards.group is None:
        return share
    result: Tensor = _MeanOverRanks.apply(share, shards)
    return result


class _MeanOverRanks(torch.autograd.Function):
    """Value: the mean over ranks. Gradient: that of this rank's own share (the trainer takes the mean)."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, shards: Shards) -> Tensor:
        mean = share.clone()
        record_all_reduce("value", mean, shards.world_size)
        dist.all_reduce(mean, group=shards.group)
        return mean / shards.world_size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
