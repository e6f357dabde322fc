"""What S_ij = scale_i <x_i, y_j> + bias + row_bias_i + col_bias_j is made of, and its entries at single pairs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .reductions import Diagonal, Target


class Operands(NamedTuple):
    """The differentiable inputs of the operator, in the order in which every backend takes them.

    Attributes:
        x: rows [N, D].
        y: columns [M, D].
        scale: [], or [N] for a temperature of each row's own; in the accumulation dtype, like the three below.
        bias: [] or None.
        row_bias: [N] or None.
        col_bias: [M] or None.
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor | None
    row_bias: Tensor | None
    col_bias: Tensor | None

    def detached(self) -> Operands:
        return Operands._make(None if each is None else each.detach() for each in self)

    @property
    def per_row_scale(self) -> bool:
        return self.scale.dim() == 1

    def length(self, dim: int) -> int:
        """Number of results of a reduction: N for rows (dim 1), M for columns (dim 0)."""
        return (self.x if dim == 1 else self.y).shape[0]


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def pair_scores(
    operands: Operands, pair: Diagonal | Target, dim: int, budget: int, missing: float = -math.inf
) -> Tensor:
    """S at each owner's own pair, in float64 (float32 on devices without), and `missing` where there is none.

    N products and no tile. They are exact to the last digit of float32 because the gradient of a well aligned
    batch hangs on them alone. Not differentiable.
    """
    x, y, *_ = operands
    exact = exact_dtype(x.device)
    scores = torch.full((operands.length(dim),), missing, dtype=exact, device=x.device)
    # Three copies of D numbers for each pair, within a quarter of the budget.
    step = max(1, budget // (4 * exact.itemsize * max(1, x.shape[1])))
    if isinstance(pair, Diagonal):
        first, last = max(0, -pair.offset), min(x.shape[0], y.shape[0] - pair.offset)
        shift = 0 if dim == 1 else pair.offset
        for start in range(first, last, step):
            stop = min(start + step, last)
            columns = slice(start + pair.offset, stop + pair.offset)
            scores[start + shift : stop + shift] = _scores_at(operands, slice(start, stop), columns, exact)
    elif y.shape[0]:
        for start in range(0, x.shape[0], step):
            block = slice(start, start + step)
            targets = pair.columns[block]
            found = _scores_at(operands, block, targets.clamp(min=0), exact)
            scores[block] = found.masked_fill_(targets < 0, missing)
    return scores


def _scores_at(operands: Operands, rows: slice, columns: slice | Tensor, exact: torch.dtype) -> Tensor:
    x, y, scale, bias, row_bias, col_bias = operands
    scores: Tensor = torch.linalg.vecdot(x[rows].to(exact), y[columns].to(exact))
    scores.mul_(scale[rows] if operands.per_row_scale else scale)
    if bias is not None:
        scores.add_(bias)
    if row_bias is not None:
        scores.add_(row_bias[rows])
    if col_bias is not None:
        scores.add_(col_bias[columns])
    return scores
