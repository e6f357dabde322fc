"""Chunked PyTorch: one tile of S at a time, in forward and backward, on any device.

A *tile* is what one matrix product makes: rows i0:i1 against columns j0:j1, in one buffer that is used again
for the next tile. With up to 8192 columns a tile is a full row block. A tile is worked off in *panels* of a few
rows, which stay in cache and bound the only other temporaries that have the width of S.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .autograd import Settings, Sweeps
from .operands import Operands
from .plan import Plan
from .torch_reductions import GRADIENTS, STATES, STATISTICS
from .torch_rules import Panel

_TILE_COLUMNS = 8192
_LEAST_TILE_ROWS = 16
_PANELS_PER_TILE = 16
# Elements below which a panel is not worth its calls: 256 KiB in float32, well inside any L2 cache.
_LEAST_PANEL = 2**16


def _tiling(n: int, m: int, d: int, dtype: torch.dtype, converted: bool, budget: int) -> tuple[int, int]:
    """Rows and columns of a tile, such that it, its panels and the float copies of its operands fit the budget."""
    size = dtype.itemsize
    columns = min(m, _TILE_COLUMNS)
    if converted:
        columns = min(columns, max(_LEAST_TILE_ROWS, budget // (4 * size * max(1, d))))
    fixed = columns * d * size if converted else 0
    # Beside the scores and a panel: the rows' features, the product that becomes dx, and its product with x.
    per_row = max(1, size * (columns + columns // _PANELS_PER_TILE + 3 * d))
    # Half the budget is for what torch and the BLAS below it allocate themselves, packed operands above all.
    rows = max(_LEAST_TILE_ROWS, (budget // 2 - fixed) // per_row)
    return max(1, min(n, rows)), columns


class _Sweep:
    """The loops over tiles and panels that forward and backward share."""

    def __init__(self, operands: Operands, budget: int) -> None:
        self.operands = operands
        self.dtype = operands.scale.dtype
        (n, d), m = operands.x.shape, operands.y.shape[0]
        converted = operands.x.dtype != self.dtype
        self.tile_rows, self.tile_columns = _tiling(n, m, d, self.dtype, converted, budget)
        worthwhile = -(-_LEAST_PANEL // max(1, self.tile_columns))
        self.panel_rows = min(self.tile_rows, max(-(-self.tile_rows // _PANELS_PER_TILE), worthwhile))
        self._scores = operands.scale.new_empty(self.tile_rows * self.tile_columns)
        self._scratch = operands.scale.new_empty(self.panel_rows * self.tile_columns)

    def row_blocks(self) -> Iterator[slice]:
        n, m = self.operands.length(1), self.operands.length(0)
        for start in range(0, n, self.tile_rows) if m else ():
            yield slice(start, min(start + self.tile_rows, n))

    def tiles(self, rows: slice, x_rows: Tensor) -> Iterator[tuple[Panel, Tensor]]:
        """Tiles of one row block, still cosines, and the columns' features in the accumulation dtype."""
        y = self.operands.y
        for start in range(0, y.shape[0], self.tile_columns):
            cols = slice(start, min(start + self.tile_columns, y.shape[0]))
            y_cols = y[cols].to(self.dtype)
            shape = (rows.stop - rows.start, cols.stop - cols.start)
            scores = self._scores[: shape[0] * shape[1]].view(shape)
            torch.mm(x_rows, y_cols.T, out=scores)
            yield Panel(scores, rows, cols), y_cols

    def panels(self, tile: Panel) -> Iterator[tuple[Panel, Tensor]]:
        """Panels of a tile, each turned from cosines into scores, and a scratch buffer of its shape."""
        _, _, scale, bias, row_bias, col_bias = self.operands
        for start in range(0, tile.scores.shape[0], self.panel_rows):
            scores = tile.scores[start : start + self.panel_rows]
            first = tile.rows.start + start
            rows = slice(first, first + scores.shape[0])
            # Not folded into x: rounding scale * x would move a whole row of scores one way.
            scores.mul_(scale[rows].unsqueeze(1) if self.operands.per_row_scale else scale)
            if bias is not None:
                scores.add_(bias)
            if row_bias is not None:
                scores.add_(row_bias[rows].unsqueeze(1))
            if col_bias is not None:
                scores.add_(col_bias[tile.cols])
            yield Panel(scores, rows, tile.cols), self._scratch[: scores.numel()].view_as(scores)


def forward_results(operands: Operands, plan: Plan, settings: Settings) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The result of each (dimension, reduction) of the plan, and what its backward needs to know."""
    states = [STATES[type(each)](each, dim, operands) for dim, each in plan]
    for state in states:
        if not state.dense:
            state.fill(settings.budget)
    dense = [state for state in states if state.dense]
    sweep = _Sweep(operands, settings.budget)
    for block in sweep.row_blocks() if dense else ():
        for tile, _ in sweep.tiles(block, operands.x[block].to(sweep.dtype)):
            for panel, scratch in sweep.panels(tile):
                for state in dense:
                    state.update(panel, scratch)
    statistics = [state.statistics() for state in states]
    return [state.result() for state in states], statistics


def backward_results(
    operands: Operands, plan: Plan, saved: list[Tensor], grads: list[Tensor], settings: Settings, needed: list[bool]
) -> list[Tensor | None]:
    """Gradients of the operands, None where not needed; `saved` is what the forward's statistics were, in a row."""
    remaining = iter(saved)
    gradients = [
        GRADIENTS[type(each)](each, dim, grad, [next(remaining) for _ in range(STATISTICS[type(each)])])
        for (dim, each), grad in zip(plan, grads, strict=True)
    ]
    return _backward_sweep(_Sweep(operands, settings.budget), gradients, needed)


def _backward_sweep(sweep: _Sweep, gradients: list[Any], needed: list[bool]) -> list[Tensor | None]:
    operands, dtype = sweep.operands, sweep.dtype
    x, y, scale, *_ = operands
    # The gradient of y is a sum over row blocks and therefore kept in the accumulation dtype.
    kinds = (x.dtype, dtype, dtype, dtype, dtype, dtype)
    dx, dy, dscale, *dbiases = (
        None if operand is None or not wanted else torch.zeros_like(operand, dtype=kind)
        for operand, kind, wanted in zip(operands, kinds, needed, strict=True)
    )
    for block in sweep.row_blocks():
        x_rows = x[block].to(dtype)
        scale_rows = scale[block].unsqueeze(1) if operands.per_row_scale else None
        scaled_rows = x_rows if scale_rows is None or dy is None else x_rows * scale_rows
        weighted = None if dx is None and dscale is None else torch.zeros_like(x_rows)
        for tile, y_cols in sweep.tiles(block, x_rows):
            for panel, scratch in sweep.panels(tile):
                _to_weights(panel, scratch, gradients)
                _add_bias_gradients(panel, *dbiases)
            if weighted is not None:
                weighted.addmm_(tile.scores, y_cols)
            if dy is not None:
                dy[tile.cols].addmm_(tile.scores.T, scaled_rows)
        if dscale is not None and weighted is not None:
            # sum_j G_ij <x_i, y_j>, from the product that dx needs anyway.
            cosines = x_rows * weighted
            if operands.per_row_scale:
                dscale[block] = cosines.sum(1)
            else:
                dscale += cosines.sum()
        if dx is not None and weighted is not None:
            dx[block] = weighted.mul_(scale if scale_rows is None else scale_rows)
    if dy is not None:
        dy = (dy if operands.per_row_scale else dy.mul_(scale)).to(y.dtype)
    return [dx, dy, dscale, *dbiases]


def _add_bias_gradients(panel: Panel, dbias: Tensor | None, drow_bias: Tensor | None, dcol_bias: Tensor | None) -> None:
    if dbias is not None:
        dbias += panel.scores.sum()
    if drow_bias is not None:
        drow_bias[panel.rows] += panel.scores.sum(1)
    if dcol_bias is not None:
        dcol_bias[panel.cols] += panel.scores.sum(0)


def _to_weights(panel: Panel, scratch: Tensor, gradients: list[Any]) -> None:
    """Turn the scores of a panel into d(results . upstream gradients) / dS, in place."""
    dense = [gradient for gradient in gradients if gradient.dense]
    collected = None
    for gradient in dense[:-1]:
        copy = Panel(scratch if collected is None else torch.empty_like(scratch), panel.rows, panel.cols)
        copy.scores.copy_(panel.scores)
        gradient.apply_(copy)
        collected = copy.scores if collected is None else collected.add_(copy.scores)
    if dense:
        dense[-1].apply_(panel)
    else:
        panel.scores.zero_()
    if collected is not None:
        panel.scores.add_(collected)
    for gradient in gradients:
        if not gradient.dense:
            gradient.apply_(panel)


SWEEPS = Sweeps("torch", forward_results, backward_results)
