"""Chunked PyTorch: one tile of S at a time, in forward and backward, on any device.

A *tile* is what one matrix product makes: rows i0:i1 against columns j0:j1, in one buffer that is used again
for the next tile. With up to 8192 columns a tile is a full row block. A tile is worked off in *panels* of a few
rows, which stay in cache and bound the only other temporary that has the width of S.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .reductions import Reduction
from .torch_reductions import GRADIENTS, STATES, Panel

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

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, budget: int) -> None:
        self.x, self.y, self.scale, self.bias = x, y, scale, bias
        self.dtype = scale.dtype
        (n, d), m = x.shape, y.shape[0]
        self.tile_rows, self.tile_columns = _tiling(n, m, d, self.dtype, x.dtype != self.dtype, budget)
        worthwhile = -(-_LEAST_PANEL // max(1, self.tile_columns))
        self.panel_rows = min(self.tile_rows, max(-(-self.tile_rows // _PANELS_PER_TILE), worthwhile))
        self._scores = scale.new_empty(self.tile_rows * self.tile_columns)
        self._scratch = scale.new_empty(self.panel_rows * self.tile_columns)

    def row_blocks(self) -> Iterator[slice]:
        for start in range(0, self.x.shape[0], self.tile_rows) if self.y.shape[0] else ():
            yield slice(start, min(start + self.tile_rows, self.x.shape[0]))

    def tiles(self, rows: slice, x_rows: Tensor) -> Iterator[tuple[Panel, Tensor]]:
        """Tiles of one row block, still cosines, and the columns' features in the accumulation dtype."""
        for start in range(0, self.y.shape[0], self.tile_columns):
            cols = slice(start, min(start + self.tile_columns, self.y.shape[0]))
            y_cols = self.y[cols].to(self.dtype)
            shape = (rows.stop - rows.start, cols.stop - cols.start)
            scores = self._scores[: shape[0] * shape[1]].view(shape)
            torch.mm(x_rows, y_cols.T, out=scores)
            yield Panel(scores, rows, cols), y_cols

    def panels(self, tile: Panel) -> Iterator[tuple[Panel, Tensor]]:
        """Panels of a tile, each turned from cosines into scores, and a scratch buffer of its shape."""
        for start in range(0, tile.scores.shape[0], self.panel_rows):
            scores = tile.scores[start : start + self.panel_rows]
            # Not folded into x: rounding scale * x would move a whole row of scores one way.
            scores.mul_(self.scale)
            if self.bias is not None:
                scores.add_(self.bias)
            first = tile.rows.start + start
            scratch = self._scratch[: scores.numel()].view_as(scores)
            yield Panel(scores, slice(first, first + scores.shape[0]), tile.cols), scratch


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


def forward_results(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, plan: list[tuple[int, Reduction]], budget: int
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The result of each (dimension, reduction) of the plan, and what its backward needs to know."""
    states = [STATES[type(each)](each, dim, (x if dim == 1 else y).shape[0], scale) for dim, each in plan]
    for state in states:
        if not state.dense:
            state.fill(x, y, scale, bias, budget)
    dense = [state for state in states if state.dense]
    sweep = _Sweep(x, y, scale, bias, budget)
    for block in sweep.row_blocks() if dense else ():
        for tile, _ in sweep.tiles(block, x[block].to(scale.dtype)):
            for panel, scratch in sweep.panels(tile):
                for state in dense:
                    state.update(panel, scratch)
    statistics = [state.statistics() for state in states]
    return [state.result() for state in states], statistics


def backward_results(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    plan: list[tuple[int, Reduction]],
    statistics: list[list[Tensor]],
    grads: list[Tensor],
    budget: int,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, scale and bias; None where not needed."""
    gradients = [
        GRADIENTS[type(reduction)](reduction, dim, grad, known)
        for (dim, reduction), grad, known in zip(plan, grads, statistics, strict=True)
    ]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return _backward_sweep(_Sweep(x, y, scale, bias, budget), gradients, needed)


class _SimilarityReduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        plan: list[tuple[int, Reduction]],
        budget: int,
    ) -> tuple[Tensor, ...]:
        results, statistics = forward_results(x, y, scale, bias, plan, budget)
        ctx.save_for_backward(x, y, scale, bias, *(tensor for each in statistics for tensor in each))
        ctx.plan = (plan, [len(each) for each in statistics], budget)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, bias, *saved = ctx.saved_tensors
        plan, counts, budget = ctx.plan
        remaining = iter(saved)
        statistics = [[next(remaining) for _ in range(count)] for count in counts]
        needed = ctx.needs_input_grad
        results = backward_results(x, y, scale, bias, plan, statistics, list(grads), budget, needed)
        if torch.is_grad_enabled():
            results = _DifferentiatedOnce.apply(*results, x, y, scale, bias, *grads)
        return *results, None, None


def _backward_sweep(sweep: _Sweep, gradients: list[Any], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    need_x, need_y, need_scale, need_bias = needed[:4]
    x, y, scale = sweep.x, sweep.y, sweep.scale
    dx = torch.zeros_like(x) if need_x else None
    dy = torch.zeros_like(y, dtype=scale.dtype) if need_y else None
    dscale, dbias = torch.zeros_like(scale), torch.zeros_like(scale)
    for block in sweep.row_blocks():
        x_rows = x[block].to(scale.dtype)
        weighted = torch.zeros_like(x_rows) if need_x or need_scale else None
        for tile, y_cols in sweep.tiles(block, x_rows):
            for panel, scratch in sweep.panels(tile):
                _to_weights(panel, scratch, gradients)
                if need_bias:
                    dbias += panel.scores.sum()
            if weighted is not None:
                weighted.addmm_(tile.scores, y_cols)
            if dy is not None:
                dy[tile.cols].addmm_(tile.scores.T, x_rows)
        if weighted is not None:
            # sum_ij G_ij <x_i, y_j>, from the product that dx needs anyway.
            dscale += (x_rows * weighted).sum()
            if dx is not None:
                dx[block] = weighted.mul_(scale)
    if dy is not None:
        dy = dy.mul_(scale).to(y.dtype)
    return dx, dy, dscale if need_scale else None, dbias if need_bias else None


class _DifferentiatedOnce(torch.autograd.Function):
    """Passes gradients through and refuses to be differentiated itself."""

    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.clone() for tensor in tensors[:4])

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "similarity_reduce cannot be differentiated twice on the torch backend: take gradients without "
            'create_graph=True, or compute this loss under use_backend("reference")'
        )


def similarity_reduce(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: tuple[Reduction, ...],
    cols: tuple[Reduction, ...],
    budget: int,
) -> tuple[Tensor, ...]:
    """Row results, then column results; scale and bias in the accumulation dtype."""
    plan = [(1, each) for each in rows] + [(0, each) for each in cols]
    results: tuple[Tensor, ...] = _SimilarityReduce.apply(x, y, scale, bias, plan, budget)
    return results
