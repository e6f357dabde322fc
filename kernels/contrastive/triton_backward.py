"""The backward of the Triton backend: panels of rows and columns within the memory budget.

For each panel `weigh_tiles` writes the weights G of its pairs to a buffer, and two products add the panel's share to dx and
dy. S is multiplied once for both, so that a backward takes 6 N M D FLOPs; a kernel that owns its rows of dx, or of dy, and
keeps them in registers multiplies S once for each, and takes 8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import Settings
from .operands import Operands
from .plan import Plan, result_count
from .reductions import (
    Chosen,
    Count,
    Diagonal,
    Hinge,
    LogSumExp,
    Paced,
    PairScore,
    Served,
    SoftmaxMean,
    SoftplusSum,
    Teacher,
)
from .torch_reductions import STATISTICS
from .triton_kernels import launching
from .triton_kernels.fields import fields_of
from .triton_kernels.launches import Launches, panel_length, plain, reach
from .triton_kernels.launching import cdiv
from .triton_kernels.product import add_product
from .triton_kernels.weigh import weigh_tiles

# Shifts (base 2) up to this size: a row's and a column's factor can share one exponential, see `weigh_tiles`.
_ONE_EXPONENTIAL = 90.0
# Rows and columns of a panel, unless it ends with S: panels then begin where tiles do.
_PANEL_MULTIPLE = 256
# A row of weights is no longer than that: offsets within a tile of 256 rows take 32 bits.
_LONGEST_PANEL = 2**22


def backward_results(
    operands: Operands, plan: Plan, saved: list[Tensor], grads: list[Tensor], settings: Settings, needed: list[bool]
) -> list[Tensor | None]:
    """Gradients of the operands, None where not needed; `saved` is what the forward's statistics were, in a row."""
    given, operands = operands, plain(operands)
    wanted = _with_gradient(plan, saved, grads)
    if not wanted:
        return [torch.zeros_like(each) if want and each is not None else None for each, want in zip(given, needed)]
    with torch.no_grad(), launching.on(operands.x.device):
        plan = [(each.dim, each.reduction) for each in wanted]
        n, m = operands.length(1), operands.length(0)
        fields = fields_of(plan, n, m, operands.scale, backward=True, scores=needed[2])
        upstream = _upstream(wanted, operands)
        gradients = _Gradients(Launches(operands, fields, settings), upstream, needed).sweep()
    return [
        None if gradient is None or leaf is None else gradient.reshape(leaf.shape)
        for gradient, leaf in zip(gradients, given, strict=True)
    ]


class Wanted(NamedTuple):
    """A reduction whose gradient is to be made: its upstream gradient, contiguous, and the forward's statistics."""

    dim: int
    reduction: LogSumExp | SoftplusSum | PairScore | SoftmaxMean | Hinge
    grad: Tensor
    statistics: list[Tensor]


def _with_gradient(plan: Plan, saved: list[Tensor], grads: list[Tensor]) -> list[Wanted]:
    """Without the reductions whose results nothing is differentiated through: of S, or of a teacher alone."""
    found: list[Wanted] = []
    statistics, upstream = iter(saved), iter(grads)
    for dim, reduction in plan:
        kept = [next(statistics) for _ in range(STATISTICS[type(reduction)])]
        grad, *_ = [next(upstream) for _ in range(result_count(reduction))]
        if not isinstance(reduction, (Count, Chosen)) and not _is_constant(reduction):
            found.append(Wanted(dim, reduction, grad.contiguous(), kept))
    return found


def _is_constant(reduction: Served) -> bool:
    if isinstance(reduction, SoftmaxMean):
        return reduction.of is not None and reduction.under is not None
    return isinstance(reduction, LogSumExp) and isinstance(reduction.of, Teacher)


@dataclass
class Upstream:
    """What the weights of the pairs are made of, for each slot, by direction: an empty tensor where a slot has none.

    Attributes:
        unit: [], a power of two; factors are given in it. Sums of a few factors then fit into float16.
        one_exponential: int32 [], see `weigh_tiles`.
    """

    shifts: dict[int, list[Tensor]]
    means: dict[int, list[Tensor]]
    factors: dict[int, list[Tensor]]
    unit: Tensor
    one_exponential: Tensor


def _upstream(wanted: list[Wanted], operands: Operands) -> Upstream:
    shifts: dict[int, list[Tensor]] = {1: [], 0: []}
    means: dict[int, list[Tensor]] = {1: [], 0: []}
    factors: dict[int, list[Tensor]] = {1: [], 0: []}
    sizes: list[Tensor] = []
    near: list[Tensor] = []
    none = operands.scale.new_zeros(0)
    # In the order of the slots: those that look at every pair come first.
    for dim, reduction, grad, statistics in sorted(wanted, key=lambda each: isinstance(each.reduction, PairScore)):
        sizes += [grad, *_amplified(reduction, grad, operands)]
        if isinstance(reduction, PairScore):
            factors[dim].append(grad)
            continue
        shift, total, mean = [*statistics, *[none] * (3 - len(statistics))]
        shifts[dim].append(shift)
        means[dim].append(mean)
        factors[dim].append((grad / total).masked_fill_(total == 0, 0) if statistics else grad)
        if isinstance(reduction, LogSumExp) and shift.numel():
            near.append(shift.abs().amax())
    unit = unit_of(sizes, operands.x.dtype, operands.x.device)
    one = torch.stack(near).amax() <= _ONE_EXPONENTIAL if near else torch.ones((), device=unit.device)
    scaled = {dim: [each / unit for each in found] for dim, found in factors.items()}
    return Upstream(shifts, means, scaled, unit, one.to(torch.int32))


def _amplified(reduction: Served, grad: Tensor, operands: Operands) -> Iterator[Tensor]:
    """Bounds of a pair's weight in G, where its upstream gradient alone is none."""
    if isinstance(reduction, (SoftplusSum, Hinge)):
        if reduction.weights is not None and reduction.weights.numel():
            yield grad * reduction.weights.amax()
    elif not operands.x.numel() or not operands.y.numel():
        return
    elif isinstance(reduction, LogSumExp) and isinstance(reduction.of, Paced):
        pace = reduction.of
        yield grad * (abs(pace.gain) * (abs(pace.slope) * _reach(None, operands) + abs(pace.offset)))
    elif isinstance(reduction, SoftmaxMean) and reduction.under is None:
        yield grad * (1 + 2 * abs(reduction.sharpness) * _reach(reduction.of, operands))


def _reach(teacher: Teacher | None, operands: Operands) -> Tensor:
    """A bound of |S|, or of a teacher's similarity."""
    if teacher is None:
        x, y, scale, *biases = operands
        return reach(x, y, scale, biases)
    assert isinstance(teacher.scale, Tensor), "the operator resolves it before a backend sees it"
    return reach(teacher.x, teacher.y, teacher.scale)


def unit_of(sizes: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A power of two near the largest upstream gradient; for float16 2^-10 of it, away from its smallest numbers."""
    found = [each.abs().amax() for each in sizes if each.numel()]
    largest = torch.stack(found).amax() if found else torch.ones((), device=device)
    # NaN and infinities go into the factors, not into the unit.
    usual = torch.where((largest > 0) & largest.isfinite(), largest, 1.0).clamp(2.0**-100, 2.0**126)
    _, exponent = torch.frexp(usual)
    return torch.ldexp(torch.ones_like(usual), exponent - (10 if dtype == torch.float16 else 0))


def sigmoid_sum(
    operands: Operands, positive: Diagonal, weight: float, settings: Settings, needed: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """weight * sum_ij softplus(-z_ij S_ij) and its gradients, S multiplied once: 6 N M D FLOPs for both.

    Gradients in the dtype of their operand, but float32 for float16 features.
    """
    operands = plain(operands)
    reduction = SoftplusSum(positive)
    with launching.on(operands.x.device):
        fields = fields_of([(1, reduction)], operands.length(1), operands.length(0), operands.scale)
        grad = operands.scale.new_full((operands.length(1),), weight)
        upstream = _upstream([Wanted(1, reduction, grad, [])], operands)
        sweep = _Gradients(Launches(operands, fields, settings), upstream, needed, values=True)
        gradients = sweep.sweep()
    return weight * sweep.value, gradients


class _Gradients:
    """The backward: one panel of S after the other."""

    #: The sum of the softplus terms, where `values` asks for it.
    value: Tensor

    def __init__(self, launches: Launches, upstream: Upstream, needed: list[bool], values: bool = False) -> None:
        self._launches, self._upstream, self._values = launches, upstream, values
        # Gradients that wait for their upstream factor: those of float16 would leave its range before they meet it.
        self._wide = values and launches.dtype == torch.float16
        operands = launches.operands
        self._needed = [want and each is not None for want, each in zip(needed, operands, strict=True)]
        self._products = self._needed[0] or self._needed[1]
        n, m, d = launches.n, launches.m, launches.d
        ragged = n % 16 != 0 or m % 16 != 0  # edges to be masked element by element
        self._tile = launches.config("weigh", pressure=launches.fields.pressure or int(values or ragged))
        # Panels end with a tile, but for the last ones.
        self._product, self._last_product = (launches.config("product", columns=d, pressure=k) for k in (0, 1))
        self._rows, self._cols = panel_shape(n, m, launches.settings.budget // operands.x.element_size())
        self._factor, self._row_scale = self._scales()
        shared = any(each.kind == 0 and each.row >= 0 and each.col >= 0 for each in launches.fields.fields)
        self._variants = (True, False) if shared else (False,)
        wanted = dict(zip(Operands._fields, self._needed, strict=True))
        self._sums = {
            "row_cosines": wanted["scale"],
            "row_sums": wanted["bias"] or wanted["row_bias"],
            "col_sums": wanted["col_bias"],
            "values": values,
        }

    def _scales(self) -> tuple[Tensor, Tensor | None]:
        """The factor of both products, and what the weights of each row are multiplied by before they are rounded."""
        scale, unit = self._launches.operands.scale, self._upstream.unit
        if not self._launches.operands.per_row_scale:
            return scale * unit, None
        largest = unit_of([scale], scale.dtype, scale.device) if scale.numel() else unit
        return largest * unit, scale / largest

    def sweep(self) -> list[Tensor | None]:
        launches = self._launches
        n, m, d = launches.n, launches.m, launches.d
        operands = launches.operands
        kinds = (torch.float32,) * 2 if self._wide else (operands.x.dtype, operands.y.dtype)
        dx, dy = (
            launches.empty(rows, d, dtype=kind) if want else None
            for rows, kind, want in zip((n, m), kinds, self._needed, strict=False)
        )
        totals = {
            name: torch.zeros(size, dtype=torch.float32, device=launches.device)
            for name, size in (("row_cosines", n), ("row_sums", n), ("col_sums", m), ("values", n))
            if self._sums[name]
        }
        if n and m:
            self._panels(dx, dy, totals)
        else:
            for each in (dx, dy):
                if each is not None:
                    each.zero_()
        unit = self._upstream.unit
        if self._values:
            self.value = totals["values"].sum()
        dscale = totals["row_cosines"] * unit if self._needed[2] else None
        if dscale is not None and not operands.per_row_scale:
            dscale = dscale.sum()
        row_sums = totals["row_sums"] * unit if self._sums["row_sums"] else None
        dbias = row_sums.sum() if row_sums is not None and self._needed[3] else None
        dcol = totals["col_sums"] * unit if self._needed[5] else None
        return [dx, dy, dscale, dbias, row_sums if self._needed[4] else None, dcol]

    def _panels(self, dx: Tensor | None, dy: Tensor | None, totals: dict[str, Tensor]) -> None:
        launches, tile = self._launches, self._tile
        n, m, d = launches.n, launches.m, launches.d
        # Whole tiles, which are stored without masks; rows so start where descriptors can load them.
        height, width = (cdiv(size, _PANEL_MULTIPLE) * _PANEL_MULTIPLE for size in (self._rows, self._cols))
        weights = launches.empty(height, width, dtype=launches.dtype) if self._products else None
        several_rows, several_cols = self._rows < n, self._cols < m
        total_x = launches.empty(self._rows, d) if dx is not None and several_cols else None
        total_y = launches.empty(m, d) if dy is not None and several_rows else None
        shapes = {"row_cosines": (1, self._rows), "row_sums": (1, self._rows), "values": (1, self._rows)}
        parts = {
            name: launches.empty(cdiv(self._cols, tile.block_n), self._rows) for name in shapes if self._sums[name]
        }
        if self._sums["col_sums"]:
            parts["col_sums"] = launches.empty(cdiv(self._rows, tile.block_m), self._cols)
        arguments = launches.tile_arguments(tile) | self._weight_arguments(weights)
        for i0 in range(0, n, self._rows):
            rows = min(self._rows, n - i0)
            for j0 in range(0, m, self._cols):
                cols = min(self._cols, m - j0)
                self._weigh(arguments, parts, totals, i0, rows, j0, cols)
                if weights is None:
                    continue
                block = weights[:rows, :cols]
                if dx is not None:
                    last = j0 + cols == m
                    into = None if total_x is None else total_x[:rows]
                    self._multiply(block, False, launches.operands.y, j0, into, dx[i0 : i0 + rows], j0 > 0, last)
                if dy is not None:
                    last = i0 + rows == n
                    into = None if total_y is None else total_y[j0 : j0 + cols]
                    self._multiply(block, True, launches.operands.x, i0, into, dy[j0 : j0 + cols], i0 > 0, last)

    def _weight_arguments(self, weights: Tensor | None) -> dict[str, Any]:
        upstream, fields = self._upstream, self._launches.fields
        filler = (self._launches.operands.scale,)
        return {
            "row_shifts": tuple(upstream.shifts[1]) or filler,
            "col_shifts": tuple(upstream.shifts[0]) or filler,
            "row_means": (tuple(upstream.means[1]) or filler) if fields.means else None,
            "col_means": (tuple(upstream.means[0]) or filler) if fields.means else None,
            "row_factors": tuple(upstream.factors[1]) or filler,
            "col_factors": tuple(upstream.factors[0]) or filler,
            "one_exponential": upstream.one_exponential if len(self._variants) > 1 else None,
            "row_scale": self._row_scale,
            "weights": weights,
            "weights_stride": 0 if weights is None else weights.stride(0),
            "PAIRS": fields.pairs,
        }

    def _weigh(
        self,
        arguments: dict[str, Any],
        parts: dict[str, Tensor],
        totals: dict[str, Tensor],
        i0: int,
        rows: int,
        j0: int,
        cols: int,
    ) -> None:
        tiles_m, tiles_n = cdiv(rows, self._tile.block_m), cdiv(cols, self._tile.block_n)
        panel = {
            "panel_row": i0,
            "panel_col": j0,
            "panel_rows": rows,
            "panel_cols": cols,
            "tiles_m": tiles_m,
            "tiles_n": tiles_n,
        }
        sums = {name: parts.get(name) for name in self._sums}
        for one in self._variants:
            launching.run(
                weigh_tiles, (tiles_m * tiles_n,), self._tile, arguments | panel | sums | {"ONE_EXPONENTIAL": one}
            )
        for name, part in parts.items():
            owners, first, tiles = (cols, j0, tiles_m) if name == "col_sums" else (rows, i0, tiles_n)
            totals[name][first : first + owners] += part.view(-1)[: tiles * owners].view(tiles, owners).sum(0)

    def _multiply(
        self,
        weights: Tensor,
        transposed: bool,
        features: Tensor,
        first: int,
        total: Tensor | None,
        out: Tensor,
        continued: bool,
        last: bool,
    ) -> None:
        launches = self._launches
        if not launches.d:
            return
        depth, rows = weights.shape if transposed else weights.shape[::-1]
        config = self._last_product if rows % _PANEL_MULTIPLE else self._product
        tma_weights = launching.aligned(weights, launches.arch)
        tma = launching.aligned(features, launches.arch)
        block = (config.block_k, config.block_m) if transposed else (config.block_m, config.block_k)
        tiles_m, tiles_n = cdiv(rows, config.block_m), cdiv(launches.d, config.block_n)
        arguments = {
            "weights": launching.source(weights, block, tma_weights),
            "features": launching.source(features, (config.block_k, config.block_n), tma),
            "weights_strides": weights.stride(),
            "features_strides": features.stride(),
            "total": total if total is not None else self._factor,
            "out": out if last else None,
            "factor": self._factor,
            "rows": rows,
            "depth": depth,
            "depth_end": first + depth,
            "width": launches.d,
            "feature_row": first,
            "tiles_m": tiles_m,
            "tiles_n": tiles_n,
            "TRANSPOSED": transposed,
            "CONTINUE": continued,
            "TMA_WEIGHTS": tma_weights,
            "TMA": tma,
            **launches.constants(),
        }
        launching.run(add_product, (tiles_m * tiles_n,), config, arguments)


def panel_shape(n: int, m: int, entries: int) -> tuple[int, int]:
    """Rows and columns of the panels of the backward, whose weights, `entries` of them, are in memory.

    Each panel reads and writes what dx and dy have so far. A side that is in every panel as a whole needs no second
    panel for its partner, and so no float32 sum of it; if neither is short enough, square panels move the least.
    """
    side = math.isqrt(entries)
    short = cdiv(min(n, m), _PANEL_MULTIPLE) * _PANEL_MULTIPLE  # as the buffer has it: whole tiles
    if short <= 2 * side:
        long = panel_length(max(n, m), min(entries / max(1, short), _LONGEST_PANEL), _PANEL_MULTIPLE)
        return (n, long) if n <= m else (long, m)
    return panel_length(n, side, _PANEL_MULTIPLE), panel_length(m, side, _PANEL_MULTIPLE)
