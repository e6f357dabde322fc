"""Sums of cross-entropies and of sigmoid losses: what most losses are, and what one sweep can differentiate.

`similarity_reduce` gives vectors and waits for their gradients, so its backward has to visit every tile again. A
sum with a known weight needs no waiting: the `cpp` and `triton` backends compute the gradient of a sigmoid sum, and `cpp`
that of a cross-entropy in one direction, in the sweep of the forward, and scale it by the upstream gradient later.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import select_backend
from . import triton_backend
from .arguments import check_features, check_targets, checked_budget, checked_precision, factor
from .autograd import Settings
from .operator import resolved_operands, similarity_reduce
from .reductions import Diagonal, LogSumExp, PairScore, SoftplusSum, Target

_OWN = Diagonal()


def cross_entropy_sum(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    pair: Diagonal | Target = _OWN,
    row_weight: float = 1.0,
    col_weight: float = 0.0,
    memory_budget: int | None = None,
) -> Tensor:
    """Weighted sum of the cross-entropies of all rows and of all columns of S = scale * x y^T.

    row_weight * sum_i softplus(LSE_{j != p(i)} S_ij - S_i,p(i)) + col_weight * (the same over columns), where p(i)
    is the column that `pair` names. This is the cross-entropy -log softmax_j(S_ij)[p(i)], written so that it does
    not cancel when pairs are well aligned. A bias of S would cancel. Rows and columns without a pair contribute 0.

    Args:
        x: rows [N, D], float16, bfloat16, float32 or float64; any strides.
        y: columns [M, D], like x.
        scale: a float, or a tensor of shape [] or [1], or one factor for each row, [N].
        pair: `Diagonal(offset)`, or `Target(columns)` with col_weight=0.
        row_weight: factor of the rows' sum. At 0 the rows are not computed.
        col_weight: factor of the columns' sum. At 0 the columns are not computed.
        memory_budget: as in `similarity_reduce`.

    Returns:
        A scalar in float32 (float64 for float64 inputs), differentiable in x, y and scale.

    Raises:
        ValueError, TypeError: as `similarity_reduce`; a `Target` with a col_weight.
    """
    if col_weight and not isinstance(pair, Diagonal):
        raise ValueError(f"col_weight={col_weight} with {type(pair).__name__}: a column has no target; use Diagonal")
    if not isinstance(pair, (Diagonal, Target)):
        raise TypeError(f"pair is {pair!r}: expected Diagonal(...) or Target(...)")
    operands = _fused_operands(x, y, scale)
    if operands is not None:
        budget = checked_budget(memory_budget)
        if isinstance(pair, Diagonal):
            targets, offset = None, pair.offset
        else:
            check_targets(pair.columns, x.shape[0], y.shape[0], x.device)
            targets, offset = pair.columns.contiguous(), 0
        total: Tensor = torch.ops.pairtile.cross_entropy_sum.default(
            *operands, targets, offset, row_weight, col_weight, budget
        )
        return total
    rows, cols = row_weight != 0 or col_weight == 0, col_weight != 0
    by_row, by_col = cross_entropies(x, y, scale=scale, pair=pair, rows=rows, cols=cols, memory_budget=memory_budget)
    weighted = [
        weight * terms.sum() for weight, terms in ((row_weight, by_row), (col_weight, by_col)) if terms is not None
    ]
    return weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]


def cross_entropies(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    pair: Diagonal | Target = _OWN,
    rows: bool = True,
    cols: bool = False,
    col_bias: Tensor | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The cross-entropy of each row [N] and of each column [M], as in `cross_entropy_sum`; None if not asked for."""
    asked = (LogSumExp(exclude=pair), PairScore(pair))
    of_rows, of_cols = similarity_reduce(
        x,
        y,
        scale=scale,
        col_bias=col_bias,
        rows=asked if rows else (),
        cols=asked if cols else (),
        memory_budget=memory_budget,
    )
    n, m = x.shape[0], y.shape[0]
    by_row = by_col = None
    if rows:
        others, own = of_rows
        by_row = _cross_entropy(others, own, _without_pair(pair, n, m, x.device))
    if cols:
        others, own = of_cols
        reverse = Diagonal(-pair.offset) if isinstance(pair, Diagonal) else pair
        by_col = _cross_entropy(others, own, _without_pair(reverse, m, n, x.device))
    return by_row, by_col


def sigmoid_sum(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor = 0.0,
    positive: Diagonal = _OWN,
    weight: float = 1.0,
    memory_budget: int | None = None,
) -> Tensor:
    """weight * sum_ij softplus(-z_ij S_ij) with S = scale * x y^T + bias; z = +1 for the positives, -1 otherwise.

    Args:
        x: rows [N, D], float16, bfloat16, float32 or float64; any strides.
        y: columns [M, D], like x.
        scale: a float, or a tensor of shape [] or [1], or one factor for each row, [N].
        bias: a float, or a tensor of shape [] or [1].
        positive: the pairs (i, i + offset).
        weight: factor of the sum.
        memory_budget: as in `similarity_reduce`.

    Returns:
        A scalar in float32 (float64 for float64 inputs), differentiable in x, y, scale and bias.

    Raises:
        ValueError, TypeError: as `similarity_reduce`.
    """
    if not isinstance(positive, Diagonal):
        raise TypeError(f"positive is {positive!r}: expected Diagonal(...)")
    operands = _fused_operands(x, y, scale)
    if operands is not None:
        shift = None if isinstance(bias, (int, float)) and bias == 0 else factor(bias, "bias", torch.float32, x.device)
        budget = checked_budget(memory_budget)
        total: Tensor = torch.ops.pairtile.sigmoid_sum.default(*operands, shift, positive.offset, weight, budget)
        return total
    if _swept_once(x, y, scale, bias):
        given = resolved_operands(x, y, scale, bias)
        settings = Settings(checked_budget(memory_budget, "triton"), checked_precision(None, "triton"))
        with torch.autocast(x.device.type, enabled=False):
            return triton_backend.sigmoid_sum(given, positive, weight, settings)
    asked = (SoftplusSum(positive=positive),)
    (terms,), _ = similarity_reduce(x, y, scale=scale, bias=bias, rows=asked, memory_budget=memory_budget)
    return weight * terms.sum()


def _cross_entropy(others: Tensor, own: Tensor, unpaired: Tensor | None) -> Tensor:
    """softplus(others - own) of each owner; 0, in value and gradient, for those that have no pair."""
    if unpaired is not None:
        others, own = others.masked_fill(unpaired, -torch.inf), own.masked_fill(unpaired, 0)
    # F.softplus turns linear above a threshold, with a relative error of 1e-10 that float64 would show. The last
    # term is 0, or NaN where the pair's score is infinite: softplus(-inf) = 0 would hide that.
    return -F.logsigmoid(own - others) + 0 * own


def _without_pair(pair: Diagonal | Target, length: int, width: int, device: torch.device) -> Tensor | None:
    """bool [length]: the owners that have no pair; None where all have one."""
    if isinstance(pair, Target):
        return pair.columns < 0
    if pair.offset >= 0 and pair.offset + length <= width:
        return None
    partner = torch.arange(pair.offset, pair.offset + length, device=device)
    return (partner < 0) | (partner >= width)


def _swept_once(*leaves: float | Tensor) -> bool:
    """Whether the triton backend serves, and a gradient will be wanted that its sweep can find beside the value.

    While torch.compile traces, `similarity_reduce` serves: its operators are registered.
    """
    tensors = [each for each in leaves if isinstance(each, Tensor)]
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and any(each.requires_grad for each in tensors)
        and all(each.dtype != torch.float64 for each in tensors[:2])
        and select_backend(tensors[0].device)[0] == "triton"
    )


def _fused_operands(x: Tensor, y: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """x, y and scale as the sums of the C++ build take them; None where `similarity_reduce` has to serve."""
    check_features(x, y)
    if select_backend(x.device)[0] != "cpp":
        return None
    if x.dtype != y.dtype:
        common = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(common), y.to(common)
    if x.dtype == torch.float64:
        return None
    return x, y, factor(scale, "scale", torch.float32, x.device, rows=x.shape[0])
