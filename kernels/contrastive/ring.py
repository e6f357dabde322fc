"""Reductions over the ranks of a group while each rank's columns travel round: every pair is scored once in each sweep.

The forward joins what each block of S comes to. The results of a row are joined where the row stays; those of a column
go along with it, and are whole when it comes home. In the backward the columns travel once more, with their whole
statistics and upstream gradients, and take their own gradients home. A rank holds its shard, two that pass, and no S.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.exchange import Exchange
from ..distributed.gathering import on_wire
from ..distributed.ring import Field, Ring
from . import block_sweeps, partial
from .autograd import Settings, differentiated_once
from .chosen import chosen_gradients
from .operands import Operands, exact_dtype, pair_scores
from .placement import Block, Metadata
from .plan import Plan, has_gradient, result_count
from .reductions import Chosen, Diagonal, PairScore, Served, Target

_COUNT = len(Operands._fields)
_X, _Y, _SCALE, _BIAS, _ROW_BIAS, _COL_BIAS = range(_COUNT)


@dataclass(frozen=True)
class Layout:
    """How many rows and columns each rank has, in rank order: those of pairs, and extra ones behind all pairs.

    Extra rows count in reductions of columns alone, extra columns in those of rows, and neither has results.
    """

    rank: int
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    extra_rows: tuple[int, ...]
    extra_cols: tuple[int, ...]

    @property
    def all_cols(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(self.cols, self.extra_cols, strict=True)))

    def segments(self, of_rows: bool, rank: int) -> list[Segment]:
        """Of a rank's rows or columns: the pairs', then the extra ones."""
        own, extra = (self.rows, self.extra_rows) if of_rows else (self.cols, self.extra_cols)
        first = Segment(slice(0, own[rank]), sum(own[:rank]), True)
        if not extra[rank]:
            return [first]
        return [first, Segment(slice(own[rank], own[rank] + extra[rank]), sum(own) + sum(extra[:rank]), False)]


class Segment(NamedTuple):
    """Some rows or columns of one rank: where it has them, their position in S, and whether they have results."""

    part: slice
    start: int
    owners: bool


@dataclass(eq=False)
class Sweep:
    """A request over a group.

    Attributes:
        exchange: the group.
        layout: of the whole S.
        plan: rows, then columns, as all ranks see them: rules name positions in S.
        backend, settings: of each block.
        needed: which operands want a gradient: of those that stay, on this rank; of those that travel, on any.
    """

    exchange: Exchange
    layout: Layout
    plan: Plan
    backend: str
    settings: Settings
    needed: tuple[bool, ...]

    def __post_init__(self) -> None:
        self.ring = Ring(self.exchange)
        self.metadata = Metadata.of(self.plan)

    def travelling(self, y: Tensor, col_bias: Tensor | None) -> list[Field]:
        """y on the wire, then the column bias if there is one, then the metadata of columns."""
        sizes = self.layout.all_cols
        fields = [Field("features", on_wire(y, self.exchange.wire_dtype), sizes)]
        rest = [*([] if col_bias is None else [col_bias]), *self.metadata.cols]
        return fields + [Field("metadata", each, sizes) for each in rest]

    def blocks(self, operands: Operands, owner: int, fields: list[Tensor]) -> Iterator[tuple[_Tile, Operands]]:
        """The blocks of this rank's rows with the columns of another, and their operands."""
        y, *rest = fields
        y = y.to(operands.x.dtype)
        col_bias = None if operands.col_bias is None else rest.pop(0)
        for cols in self.layout.segments(False, owner):
            for rows in self.layout.segments(True, self.layout.rank):
                places = [k for k, (dim, _) in enumerate(self.plan) if (rows if dim == 1 else cols).owners]
                if not places or rows.part.start == rows.part.stop or cols.part.start == cols.part.stop:
                    continue
                block = Block(
                    rows.start,
                    cols.start,
                    cols.part.stop - cols.part.start,
                    {id(each): each[rows.part] for each in self.metadata.rows},
                    {id(each): part[cols.part] for each, part in zip(self.metadata.cols, rest, strict=True)},
                )
                yield (
                    _Tile(rows, cols, block.place([self.plan[k] for k in places]), places),
                    Operands(
                        operands.x[rows.part],
                        y[cols.part],
                        operands.scale[rows.part] if operands.per_row_scale else operands.scale,
                        operands.bias,
                        None if operands.row_bias is None else operands.row_bias[rows.part],
                        None if col_bias is None else col_bias[cols.part],
                    ),
                )


class _Tile(NamedTuple):
    """A block: where it lies, its plan, and the places of that in the whole plan."""

    rows: Segment
    cols: Segment
    plan: Plan
    places: list[int]


def ring_reduce(sweep: Sweep, operands: Operands) -> tuple[Tensor, ...]:
    """Row results of this rank's rows over all columns, then column results of its columns over all rows."""
    results: tuple[Tensor, ...] = _RingReduce.apply(*operands, sweep)
    return results


class _RingReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        operands, sweep = Operands(*arguments[:_COUNT]), arguments[_COUNT]
        parts = _forward(sweep, operands)
        results: list[Tensor] = []
        constant: list[Tensor] = []
        for (_, reduction), part in zip(sweep.plan, parts, strict=True):
            mine = partial.results_of(reduction, part, operands.scale.dtype)
            results += mine
            constant += [] if _differentiable(reduction) else mine
            constant += [each for each in mine if not each.is_floating_point()]
        ctx.sweep = sweep
        ctx.counts = [len(part) for part in parts]
        ctx.save_for_backward(*operands, *(each for part in parts for each in part))
        ctx.mark_non_differentiable(*constant)
        return tuple(each.clone() if any(each is one for part in parts for one in part) else each for each in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        operands, flat = Operands(*saved[:_COUNT]), iter(saved[_COUNT:])
        parts = [[next(flat) for _ in range(count)] for count in ctx.counts]
        upstream = iter(grads)
        by_reduction = [[next(upstream) for _ in range(result_count(each))] for _, each in ctx.sweep.plan]
        with torch.no_grad(), torch.autocast(operands.x.device.type, enabled=False):
            gradients = _backward(ctx.sweep, operands, parts, by_reduction)
        wanted = ctx.needs_input_grad[:_COUNT]
        gradients = [each if want else None for each, want in zip(gradients, wanted, strict=True)]
        return *differentiated_once(ctx.sweep.backend, gradients, [*operands, *grads]), None


def _differentiable(reduction: Served) -> bool:
    return has_gradient(reduction) or (isinstance(reduction, Chosen) and reduction.of is None)


def _forward(sweep: Sweep, operands: Operands) -> list[partial.Partial]:
    rank, layout, like = sweep.layout.rank, sweep.layout, operands.scale
    of_rows = [partial.of_nothing(each, layout.rows[rank], like) for dim, each in sweep.plan if dim == 1]
    reductions = [each for dim, each in sweep.plan if dim == 0]

    def visit(owner: int, fields: list[Tensor]) -> list[Tensor]:
        of_cols = [partial.of_nothing(each, layout.cols[owner], like) for each in reductions]
        for tile, given in sweep.blocks(operands, owner, fields):
            parts = block_sweeps.forward(sweep.backend, given, tile.plan, sweep.settings)
            for place, (dim, reduction), part in zip(tile.places, tile.plan, parts, strict=True):
                if isinstance(reduction, Chosen):
                    start = (tile.cols if dim == 1 else tile.rows).start
                    part[1] = torch.where(part[1] < 0, part[1], part[1] + start)
                into, at = (of_rows, place) if dim == 1 else (of_cols, place - len(of_rows))
                into[at] = partial.joined(reduction, into[at], part)
        return [each for part in of_cols for each in part]

    def join(arrived: list[Tensor], made: list[Tensor]) -> list[Tensor]:
        return [
            each
            for reduction, a, b in zip(reductions, _split(arrived, reductions), _split(made, reductions), strict=True)
            for each in partial.joined(reduction, a, b)
        ]

    home = [("statistics", layout.cols) for each in reductions for _ in range(partial.vectors(each))]
    fields = sweep.travelling(operands.y, operands.col_bias)
    found = sweep.ring.circulate(fields, visit, join, home)
    return of_rows + _split(found, reductions)


def _split(flat: list[Tensor], reductions: list[Served]) -> list[partial.Partial]:
    remaining = iter(flat)
    return [[next(remaining) for _ in range(partial.vectors(each))] for each in reductions]


def _backward(
    sweep: Sweep, operands: Operands, parts: list[partial.Partial], grads: list[list[Tensor]]
) -> list[Tensor | None]:
    layout, like = sweep.layout, operands.scale
    needed = list(sweep.needed)
    found: list[Tensor | None] = [
        None if each is None or not wanted else torch.zeros_like(each, dtype=like.dtype)
        for each, wanted in zip(operands, needed, strict=True)
    ]
    rows = sum(dim == 1 for dim, _ in sweep.plan)
    # What a reduction of columns needs to know, and its upstream gradients, go along with them.
    along = [
        Field(purpose, each, layout.cols)
        for part, upstream in zip(parts[rows:], grads[rows:], strict=True)
        for purpose, tensors in (("statistics", part), ("upstream", upstream))
        for each in tensors
    ]
    fields = sweep.travelling(operands.y, operands.col_bias) + along
    lengths = [(len(part), len(upstream)) for part, upstream in zip(parts[rows:], grads[rows:], strict=True)]

    def visit(owner: int, given: list[Tensor]) -> list[Tensor]:
        columns, visiting = given[: len(given) - len(along)], iter(given[len(given) - len(along) :])
        known, upstream = parts[:rows], grads[:rows]
        for tensors, of_results in lengths:
            known = [*known, [next(visiting) for _ in range(tensors)]]
            upstream = [*upstream, [next(visiting) for _ in range(of_results)]]
        width = layout.all_cols[owner]
        taken = {k: like.new_zeros(width, *operands[k].shape[1:]) for k in (_Y, _COL_BIAS) if needed[k]}  # type: ignore[union-attr]
        for tile, block in sweep.blocks(operands, owner, columns):
            gradients = _block_gradients(
                sweep, tile, block, [known[k] for k in tile.places], [upstream[k] for k in tile.places], needed
            )
            for k, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                target = taken[k] if k in taken else found[k]
                assert target is not None
                part = tile.cols.part if k in taken else tile.rows.part
                (target[part] if target.dim() else target).add_(gradient)
        return list(taken.values())

    def join(arrived: list[Tensor], made: list[Tensor]) -> list[Tensor]:
        return [mine.add_(theirs) for theirs, mine in zip(arrived, made, strict=True)]

    travelled = [k for k in (_Y, _COL_BIAS) if needed[k]]
    home = sweep.ring.circulate(fields, visit, join, [("gradients", layout.all_cols) for _ in travelled])
    for k, gradient in zip(travelled, home, strict=True):
        found[k] = gradient
    return [
        None if gradient is None or operand is None else gradient.to(operand.dtype)
        for gradient, operand in zip(found, operands, strict=True)
    ]


def _block_gradients(
    sweep: Sweep,
    tile: _Tile,
    operands: Operands,
    known: list[partial.Partial],
    upstream: list[list[Tensor]],
    needed: list[bool],
) -> list[Tensor | None]:
    gradients = block_sweeps.backward(sweep.backend, operands, tile.plan, known, upstream, sweep.settings, needed)
    for (dim, reduction), part, grad in zip(tile.plan, known, upstream, strict=True):
        if not isinstance(reduction, Chosen) or reduction.of is not None:
            continue
        start, width = (tile.cols if dim == 1 else tile.rows).start, operands.length(1 - dim)
        indices = part[1] - start
        indices = indices.masked_fill((indices < 0) | (indices >= width), -1)
        more = chosen_gradients(operands, indices, grad[0], dim, sweep.settings.budget, needed)
        gradients = [
            each if one is None else (one if each is None else each + one)
            for each, one in zip(gradients, more, strict=True)
        ]
    return gradients


def own_scores(sweep: Sweep, operands: Operands, pair: Diagonal | Target, dim: int, missing: float) -> Tensor:
    """S of each owner's own pair in float64, wherever its partner is; `missing` where it has none. No gradient."""
    layout, rank = sweep.layout, sweep.layout.rank
    exact = exact_dtype(operands.x.device)
    rows = operands.x.new_full((layout.rows[rank],), missing, dtype=exact)
    asking = Sweep(sweep.exchange, layout, [(dim, PairScore(pair))], sweep.backend, sweep.settings, sweep.needed)

    def visit(owner: int, fields: list[Tensor]) -> list[Tensor]:
        cols = operands.x.new_full((layout.cols[owner],), missing, dtype=exact)
        for tile, given in asking.blocks(operands, owner, fields):
            ((_, placed),) = tile.plan
            assert isinstance(placed, PairScore)
            scores = pair_scores(given, placed.pair, dim, sweep.settings.budget, missing)
            into = rows if dim == 1 else cols
            torch.where(into == missing, scores, into, out=into)
        return [cols] if dim == 0 else []

    def join(arrived: list[Tensor], made: list[Tensor]) -> list[Tensor]:
        return [torch.where(arrived[0] == missing, made[0], arrived[0])]

    fields = asking.travelling(operands.y, operands.col_bias)
    home = asking.ring.circulate(fields, visit, join, [("statistics", layout.cols)] if dim == 0 else [])
    return rows if dim == 1 else home[0]
