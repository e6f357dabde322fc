"""The gradient of the k largest scores of each owner: sparse, so that no tile is visited for it.

Of S_ij = scale_i <x_i, y_j> + biases the chosen pairs alone have a gradient: N k of N M. The scores themselves come from
the sweep. Every product here is an `embedding_bag`, which adds up weighted rows without copying them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import Operands
from .plan import result_count
from .reductions import Chosen, Served

_OPERANDS = len(Operands._fields)


def with_chosen_gradients(
    results: tuple[Tensor, ...],
    operands: Operands,
    rows: tuple[Served, ...],
    cols: tuple[Served, ...],
    budget: int,
) -> tuple[Tensor, ...]:
    """A backend's results, those of `Chosen` with the gradient of their scores."""
    found = list(results)
    at = 0
    for dim, reductions in ((1, rows), (0, cols)):
        for reduction in reductions:
            if isinstance(reduction, Chosen) and reduction.of is None:
                found[at] = _ChosenScores.apply(*operands, found[at], found[at + 1], dim, budget)
            at += result_count(reduction)
    return tuple(found)


class _ChosenScores(torch.autograd.Function):
    """Takes the operands, scores and indices [owners, k], the dimension reduced and the budget; gives the scores."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        scores, indices, dim, budget = arguments[_OPERANDS:]
        ctx.save_for_backward(*arguments[:_OPERANDS], indices)
        ctx.dim, ctx.budget = dim, budget
        return scores.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, indices = ctx.saved_tensors
        operands, needed = Operands(*given), ctx.needs_input_grad
        with torch.autocast(operands.x.device.type, enabled=False):
            gradients = _gradients(operands, grad, indices, ctx.dim, needed)
        return *gradients, None, None, None, None


def _gradients(
    operands: Operands, grad: Tensor, indices: Tensor, dim: int, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    x, y, scale, *_ = operands
    weights = grad.masked_fill(indices < 0, 0).to(scale.dtype)  # what stands in for a missing pair has no gradient
    partners = indices.clamp(min=0)
    owners = torch.arange(len(indices), device=indices.device).unsqueeze(1).expand_as(indices)
    rows, columns = (owners, partners) if dim == 1 else (partners, owners)
    rows, columns, weights = rows.reshape(-1), columns.reshape(-1), weights.reshape(-1)
    n, m = x.shape[0], y.shape[0]
    dx = dy = dscale = None
    if needed[0] or needed[2]:
        weighted = _sum_rows(y, columns, rows, weights, n)
        if needed[2]:
            dscale = (x.to(scale.dtype) * weighted).sum(1)
            dscale = dscale if operands.per_row_scale else dscale.sum()
        if needed[0]:
            dx = (weighted * (scale.unsqueeze(1) if operands.per_row_scale else scale)).to(x.dtype)
    if needed[1]:
        scaled = weights * (scale[rows] if operands.per_row_scale else scale)
        dy = _sum_rows(x, rows, columns, scaled, m).to(y.dtype)
    return [
        dx,
        dy,
        dscale,
        weights.sum() if needed[3] else None,
        _sum_by(weights, rows, n) if needed[4] else None,
        _sum_by(weights, columns, m) if needed[5] else None,
    ]


def _sum_rows(features: Tensor, taken: Tensor, to: Tensor, weights: Tensor, length: int) -> Tensor:
    """out[i] = the sum over pairs p with to[p] = i of weights[p] * features[taken[p]], in the dtype of the weights."""
    if not len(taken) or not length:
        return weights.new_zeros(length, features.shape[1])
    order = to.argsort(stable=True)
    counts = torch.zeros(length + 1, dtype=torch.int64, device=to.device)
    counts[1:].scatter_add_(0, to, torch.ones_like(to))
    return F.embedding_bag(
        taken[order],
        features.detach().to(weights.dtype).contiguous(),
        counts.cumsum(0),
        mode="sum",
        per_sample_weights=weights[order],
        include_last_offset=True,
    )


def _sum_by(weights: Tensor, to: Tensor, length: int) -> Tensor:
    return _sum_rows(weights.new_ones(1, 1), torch.zeros_like(to), to, weights, length).squeeze(1)
