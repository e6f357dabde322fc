"""Chunked PyTorch: one tile of S at a time, in forward and backward, on any device.

A *tile* is what one matrix product makes: rows i0:i1 against columns j0:j1, in one buffer that is used again
for the next tile. With up to 8192 columns a tile is a full row block. A tile is worked off in *panels* of a few
rows, which stay in cache and bound the only other temporaries that have the width of S.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .autograd import Settings, Sweeps
from .operands import Operands
from .plan import Plan
from .reductions import Teacher
from .torch_gradients import DenseGradient, Gradient, PairScoreGradient, gradients_of
from .torch_reductions import DenseState, similarities, state_of
from .torch_rules import Panel

_TILE_COLUMNS = 8192
_LEAST_TILE_ROWS = 16
_PANELS_PER_TILE = 16
# Elements below which a panel is not worth its calls: 256 KiB in float32, well inside any L2 cache.
_LEAST_PANEL = 2**16


def _tiling(n: int, m: int, widths: list[int], dtype: torch.dtype, converted: bool, budget: int) -> tuple[int, int]:
    """Rows and columns of a tile, such that it, its panels and the float copies of its operands fit the budget.

    `widths` are those of the features of S and of each teacher, which has a tile of its own.
    """
    size, d = dtype.itemsize, sum(widths)
    columns = min(m, _TILE_COLUMNS)
    if converted:
        columns = min(columns, max(_LEAST_TILE_ROWS, budget // (4 * size * max(1, d))))
    fixed = columns * d * size if converted else 0
    # Beside the scores and a panel: the rows' features, the product that becomes dx, and its product with x.
    per_row = max(1, size * (columns * len(widths) + columns // _PANELS_PER_TILE + 2 * widths[0] + d))
    # Half the budget is for what torch and the BLAS below it allocate themselves, packed operands above all.
    rows = max(_LEAST_TILE_ROWS, (budget // 2 - fixed) // per_row)
    return max(1, min(n, rows)), columns


class _Sweep:
    """The loops over tiles and panels that forward and backward share.

    `looks_at`: the similarities that anybody looks at, None being S. The others are not multiplied. Tiles are those of
    the whole plan all the same: a product of another shape is rounded in another order, and where scores are large
    the weights of the backward would no longer be those that the forward added up.
    """

    def __init__(self, operands: Operands, plan: Plan, looks_at: set[Teacher | None], budget: int) -> None:
        self.operands, self._scored = operands, None in looks_at
        self.dtype = operands.scale.dtype
        n, m = operands.length(1), operands.length(0)
        named = {teacher: None for _, each in plan for teacher in similarities(each) if teacher is not None}
        teachers = [each for each in named if each in looks_at]
        widths = [operands.x.shape[1], *(each.x.shape[1] for each in named)]
        converted = operands.x.dtype != self.dtype
        self.tile_rows, self.tile_columns = _tiling(n, m, widths, self.dtype, converted, budget)
        worthwhile = -(-_LEAST_PANEL // max(1, self.tile_columns))
        self.panel_rows = min(self.tile_rows, max(-(-self.tile_rows // _PANELS_PER_TILE), worthwhile))
        elements = self.tile_rows * self.tile_columns
        self._scores = operands.scale.new_empty(elements)
        self._taught = {each: operands.scale.new_empty(elements) for each in teachers}
        self._scratch = operands.scale.new_empty(self.panel_rows * self.tile_columns)

    def row_blocks(self) -> Iterator[slice]:
        n, m = self.operands.length(1), self.operands.length(0)
        for start in range(0, n, self.tile_rows) if m else ():
            yield slice(start, min(start + self.tile_rows, n))

    def tiles(self, rows: slice, x_rows: Tensor) -> Iterator[tuple[Panel, Tensor]]:
        """Tiles of one row block, still cosines, and the columns' features in the accumulation dtype."""
        y, shape = self.operands.y, (rows.stop - rows.start, -1)
        taught_rows = {teacher: teacher.x[rows].to(self.dtype) for teacher in self._taught}
        for start in range(0, y.shape[0], self.tile_columns):
            cols = slice(start, min(start + self.tile_columns, y.shape[0]))
            size = shape[0] * (cols.stop - cols.start)
            y_cols, scores = y[cols].to(self.dtype), self._scores[:size].view(shape)
            if self._scored:
                torch.mm(x_rows, y_cols.T, out=scores)
            taught = {teacher: tile[:size].view(shape) for teacher, tile in self._taught.items()}
            for teacher, tile in taught.items():
                torch.mm(taught_rows[teacher], teacher.y[cols].to(self.dtype).T, out=tile)
            yield Panel(scores, rows, cols, taught), y_cols

    def panels(self, tile: Panel) -> Iterator[tuple[Panel, Tensor]]:
        """Panels of a tile, each turned from cosines into scores, and a scratch buffer of its shape."""
        for start in range(0, tile.scores.shape[0], self.panel_rows):
            panel = tile.part(slice(start, start + self.panel_rows), slice(0, None))
            if self._scored:
                self._score_(panel)
            for teacher, scores in panel.taught.items():
                assert isinstance(teacher.scale, Tensor), "the operator resolves it before a backend sees it"
                scores.mul_(_of_rows(teacher.scale, panel.rows))
            yield panel, self._scratch[: panel.scores.numel()].view_as(panel.scores)

    def _score_(self, panel: Panel) -> None:
        _, _, scale, bias, row_bias, col_bias = self.operands
        # Not folded into x: rounding scale * x would move a whole row of scores one way.
        panel.scores.mul_(_of_rows(scale, panel.rows))
        if bias is not None:
            panel.scores.add_(bias)
        if row_bias is not None:
            panel.scores.add_(row_bias[panel.rows].unsqueeze(1))
        if col_bias is not None:
            panel.scores.add_(col_bias[panel.cols])

    def strips(self, tile: Panel) -> Iterator[tuple[Panel, Tensor]]:
        """A tile whose panels are done, as panels of a few whole columns; the scratch holds column after column."""
        height, width = tile.scores.shape
        columns = max(1, self._scratch.numel() // height)
        for start in range(0, width, columns):
            strip = tile.part(slice(0, None), slice(start, start + columns))
            yield strip, self._scratch[: strip.scores.numel()].view(-1, height).T


def _of_rows(scale: Tensor, rows: slice) -> Tensor:
    return scale[rows].unsqueeze(1) if scale.dim() else scale


def forward_results(operands: Operands, plan: Plan, settings: Settings) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The results of each (dimension, reduction) of the plan, and what its backward needs to know."""
    states = [state_of(each, dim, operands, settings.budget) for dim, each in plan]
    dense = [state for state in states if isinstance(state, DenseState)]
    by_panel, by_strip = ([state for state in dense if state.by_strip == each] for each in (False, True))
    looks_at = set().union(*(similarities(each) for _, each in plan))
    sweep = _Sweep(operands, plan, looks_at, settings.budget)
    for block in sweep.row_blocks() if dense else ():
        for tile, _ in sweep.tiles(block, operands.x[block].to(sweep.dtype)):
            for panel, scratch in sweep.panels(tile):
                for state in by_panel:
                    state.update(panel, scratch)
            for strip, scratch in sweep.strips(tile) if by_strip else ():
                for state in by_strip:
                    state.update(strip, scratch)
    return [result for state in states for result in state.results()], [state.statistics() for state in states]


def backward_results(
    operands: Operands, plan: Plan, saved: list[Tensor], grads: list[Tensor], settings: Settings, needed: list[bool]
) -> list[Tensor | None]:
    """Gradients of the operands, None where not needed; `saved` is what the forward's statistics were, in a row."""
    gradients = gradients_of(plan, saved, grads)
    looks_at = set().union(*(each.looks_at for each in gradients))
    return _backward_sweep(_Sweep(operands, plan, looks_at, settings.budget), gradients, needed)


def _backward_sweep(sweep: _Sweep, gradients: list[Gradient], needed: list[bool]) -> list[Tensor | None]:
    operands, dtype = sweep.operands, sweep.dtype
    x, y, scale, *_ = operands
    # The gradient of y is a sum over row blocks and therefore kept in the accumulation dtype.
    kinds = (x.dtype, dtype, dtype, dtype, dtype, dtype)
    dx, dy, dscale, *dbiases = (
        None if operand is None or not wanted else torch.zeros_like(operand, dtype=kind)
        for operand, kind, wanted in zip(operands, kinds, needed, strict=True)
    )
    for block in sweep.row_blocks() if gradients else ():
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


def _to_weights(panel: Panel, scratch: Tensor, gradients: list[Gradient]) -> None:
    """Turn the scores of a panel into d(results . upstream gradients) / dS, in place."""
    dense = [gradient for gradient in gradients if isinstance(gradient, DenseGradient)]
    collected = None
    for gradient in dense[:-1]:
        out = scratch if collected is None else torch.empty_like(scratch)
        gradient.write(panel, out)
        collected = out if collected is None else collected.add_(out)
    if dense:
        dense[-1].write(panel, panel.scores)
    else:
        panel.scores.zero_()
    if collected is not None:
        panel.scores.add_(collected)
    for each in gradients:
        if isinstance(each, PairScoreGradient):
            each.add_(panel)


SWEEPS = Sweeps("torch", forward_results, backward_results)
