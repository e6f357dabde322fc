"""Cross-entropies of nested prefixes of the features, all widths in one sweep where the C++ build serves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import select_backend
from .arguments import check_features, checked_budget
from .autograd import differentiated_once
from .reductions import Diagonal
from .sums import cross_entropy_sum

# As csrc/cpu/problem.h's kSafeScore: exp of a score needs no shift up to here.
_SAFE_SCORE = 50.0
# Wider ones are multiplied width by width, in tiles that are cut to fit.
_WIDEST = 8192


def nested_cross_entropy_sum(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    widths: Sequence[int],
    weights: Sequence[float],
    normalize: bool = True,
    offset: int = 0,
    row_weight: float = 1.0,
    col_weight: float = 0.0,
    memory_budget: int | None = None,
) -> Tensor:
    """Weighted sum over widths w of the cross-entropies of S = scale * x[:, :w] y[:, :w]^T.

    sum_w weights_w cross_entropy_sum(x[:, :w], y[:, :w], pair=Diagonal(offset), row_weight, col_weight), each prefix
    brought to length 1 first if `normalize` is set. On the `cpp` backend float32 features take one sweep for all widths:
    the products of one are those of the narrower one before and the features between. That sweep wants scores of at
    most 50; larger ones, 16-bit features and the other backends take one sweep for each width.

    Args:
        x: rows [N, D], any floating dtype.
        y: columns [M, D], like x.
        scale: a float, or a tensor of shape [] or [1].
        widths: prefixes, ascending, from 1 to D.
        weights: one for each width.
        normalize: divide each prefix by its length.
        offset: row i belongs to column i + offset.
        row_weight, col_weight: factors of the rows' and the columns' sums, as in `cross_entropy_sum`.
        memory_budget: as in `similarity_reduce`.

    Returns:
        A scalar in float32 (float64 for float64 inputs), differentiable in x, y and scale.

    Raises:
        ValueError, TypeError: as `cross_entropy_sum`; widths that do not ascend or leave the features, or another number
            of weights.
    """
    check_features(x, y)
    _check_widths(widths, weights, x.shape[1])
    x, y = x[:, : widths[-1]], y[:, : widths[-1]]
    # One feature of length 1 is a sign: its gradient is 0, which the sweep would leave as a difference.
    if not (normalize and widths[0] == 1) and _in_one_sweep(x, y, scale, normalize):
        budget = checked_budget(memory_budget)
        request = (list(widths), [float(each) for each in weights], row_weight, col_weight, offset, normalize, budget)
        total: Tensor = _NestedCrossEntropySum.apply(x, y, scale, *request)
        return total
    terms = []
    for width, weight in zip(widths, weights, strict=True):
        terms.append(
            cross_entropy_sum(
                prefix(x, width, normalize),
                prefix(y, width, normalize),
                scale=scale,
                pair=Diagonal(offset),
                row_weight=weight * row_weight,
                col_weight=weight * col_weight,
                memory_budget=memory_budget,
            )
        )
    return torch.stack(terms).sum()


def prefix(features: Tensor, width: int, normalize: bool) -> Tensor:
    """The first features of each row, divided by their length if asked."""
    found = features[:, :width]
    if not normalize:
        return found
    # The length in float32: one rounding of 16-bit features, as the model's own normalisation has.
    wide = found.to(torch.promote_types(found.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(features.dtype)


def _check_widths(widths: Sequence[int], weights: Sequence[float], width: int) -> None:
    ascending = all(a < b for a, b in zip((0, *widths), widths, strict=False))
    if not widths or not ascending or widths[-1] > width:
        raise ValueError(f"widths={list(widths)}: expected ascending numbers from 1 to {width}, the features' width")
    if len(weights) != len(widths):
        raise ValueError(f"{len(weights)} weights for {len(widths)} widths: expected one for each")


def _in_one_sweep(x: Tensor, y: Tensor, scale: float | Tensor, normalize: bool) -> bool:
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or y.dtype != torch.float32:
        return False
    if select_backend(x.device)[0] != "cpp" or x.shape[1] > _WIDEST or not x.numel() or not y.numel():
        return False
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return False
    bound = float(scale.detach() if isinstance(scale, Tensor) else scale)
    if not normalize:
        bound *= float(
            torch.linalg.vector_norm(x.detach(), dim=1).max() * torch.linalg.vector_norm(y.detach(), dim=1).max()
        )
    return 0 < bound <= _SAFE_SCORE


class _NestedCrossEntropySum(torch.autograd.Function):
    """Takes x, y, the scale, and the rest of the operator's arguments in their order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: float | Tensor, *request: Any) -> Tensor:
        ctx.request = (float(scale), *request)
        wanted = any(ctx.needs_input_grad)
        value, *state = torch.ops.pairtile.nested_cross_entropy_forward(x, y, *ctx.request, wanted)
        ctx.save_for_backward(x, y, *([scale] if isinstance(scale, Tensor) else []), *state)
        ctx.differentiates_scale = isinstance(scale, Tensor)
        total: Tensor = value
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *state = ctx.saved_tensors
        scale = state.pop(0) if ctx.differentiates_scale else None
        with torch.no_grad():
            dx, dy, dscale = torch.ops.pairtile.nested_cross_entropy_backward(x, y, *ctx.request, *state, float(grad))
        found: list[Tensor | None] = [dx, dy, None if scale is None else dscale.to(scale.dtype).reshape(scale.shape)]
        found = [each if wanted else None for each, wanted in zip(found, ctx.needs_input_grad, strict=False)]
        return *differentiated_once("cpp", found, [x, y, grad]), *[None] * 7
