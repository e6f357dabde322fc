"""Reductions of a similarity matrix whose rows and columns lie over the ranks of a group."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.exchange import Exchange
from ..distributed.gathering import gather, gather_ids
from ..distributed.shards import Shards, all_numbers
from ..dtypes import FEATURE_DTYPES
from .autograd import Settings
from .operands import Operands
from .placement import Block, Metadata, with_vector_scales
from .reductions import PairRules, Reduction, rules_of
from .request import Request
from .ring import Layout, Sweep, own_scores, ring_reduce

Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Extra:
    """How many of this rank's last rows, and of its last columns, belong to no pair.

    They stand behind all ranks' pairs, have no results, and count in reductions of the other side alone.
    """

    rows: int = 0
    cols: int = 0


NO_EXTRA = Extra()


def ring_results(
    exchange: Exchange,
    operands: Operands,
    rows: Iterable[Reduction],
    cols: Iterable[Reduction],
    backend: str,
    settings: Settings,
    extra: Extra,
) -> Results:
    """Row results of this rank's rows over all columns, and column results of its columns over all rows."""
    rows, cols = list(rows), list(cols)
    layout, wanted, operands = agreed(exchange, operands, extra, rows, cols)
    needed = tuple(
        each if k in (1, 5) else mine for k, (each, mine) in enumerate(zip(wanted, wanted_by(operands), strict=True))
    )
    operands = attached(operands, wanted)
    backend = "torch" if operands.x.dtype == torch.float64 and backend in ("cpp", "triton") else backend
    thresholds = Sweep(exchange, layout, [], backend, settings, needed)
    request = Request(
        operands,
        settings.budget,
        sum(layout.cols) + sum(layout.extra_cols),
        lambda pair, dim, missing: own_scores(thresholds, operands.detached(), pair, dim, missing),
    )
    of_rows, of_cols = request.reductions(rows, "rows", 1), request.reductions(cols, "cols", 0)
    plan = [*((1, each) for each in of_rows.served), *((0, each) for each in of_cols.served)]
    results = ring_reduce(Sweep(exchange, layout, plan, backend, settings, needed), operands)
    return of_rows.assemble(results[: of_rows.results]), of_cols.assemble(results[of_rows.results :])


def attached(operands: Operands, wanted: Sequence[bool]) -> Operands:
    """A part of the graph if any rank's are: this rank's backward must take part in what the others' ask for."""
    if any(wanted) and not any(wanted_by(operands)):
        return operands._replace(x=operands.x.detach().requires_grad_())
    return operands


def wanted_by(operands: Operands) -> list[bool]:
    """Which of the operands want a gradient on this rank."""
    return [torch.is_grad_enabled() and each is not None and each.requires_grad for each in operands]


def agreed(
    exchange: Exchange, operands: Operands, extra: Extra, rows: Sequence[Reduction], cols: Sequence[Reduction]
) -> tuple[Layout, list[bool], Operands]:
    """How rows and columns lie over the ranks, and which operands want a gradient on any of them: one small exchange.

    Returns the operands too: where one rank has a temperature for each row, all have. (One row's is a number.)
    """
    x, y, scale = operands.x, operands.y, operands.scale
    mine = [len(x) - extra.rows, len(y) - extra.cols, extra.rows, extra.cols]
    asked = zlib.crc32(repr((_kinds(rows), _kinds(cols))).encode())
    form = [x.shape[1], FEATURE_DTYPES.index(x.dtype), *(int(each is not None) for each in operands[3:]), asked]
    flags = [*wanted_by(operands), operands.per_row_scale]
    table = all_numbers([*mine, *form, *map(int, flags)], exchange.group, x.device)
    forms = [row[4 : 4 + len(form)] for row in table]
    if any(each != forms[0] for each in forms):
        listed = ", ".join(
            f"rank {rank}: width {width}, {FEATURE_DTYPES[dtype]}, bias {bool(bias)}, row_bias {bool(row)}, "
            f"col_bias {bool(col)}, reductions {asked:08x}"
            for rank, (width, dtype, bias, row, col, asked) in enumerate(forms)
        )
        raise ValueError(
            f"ranks differ ({listed}): every rank must pass one width and dtype, the same kinds of arguments, and ask for "
            "the same reductions in the same order"
        )
    n, m, extra_n, extra_m = zip(*(row[:4] for row in table), strict=True)
    *wanted, per_row = (any(each) for each in zip(*(row[4 + len(form) :] for row in table), strict=True))
    if per_row:
        operands = operands._replace(scale=scale.expand(len(x)))
    return Layout(dist.get_rank(exchange.group), n, m, extra_n, extra_m), wanted, operands


def _kinds(reductions: Sequence[Reduction]) -> list[object]:
    """What must be the same on all ranks: kinds of reductions and of rules, and how many scores are chosen."""
    return [
        (type(each).__name__, getattr(each, "k", 1), [type(rule).__name__ for rule in rules_of(_excluded(each))])
        for each in reductions
    ]


def _excluded(reduction: Reduction) -> PairRules | None:
    found: PairRules | None = getattr(reduction, "exclude", None)
    return found


@dataclass(frozen=True)
class Gathered:
    """One direction of a matrix of which all ranks' rows, or columns, are here."""

    operands: Operands
    rows: list[Reduction]
    cols: list[Reduction]


def gathered_directions(
    exchange: Exchange, operands: Operands, rows: Sequence[Reduction], cols: Sequence[Reduction]
) -> list[Gathered]:
    """What similarity_reduce is to reduce instead: this rank's rows with all columns, and all rows with its columns.

    Every rank takes part in every exchange, in the order rows, columns.
    """
    layout, _, operands = agreed(exchange, operands, NO_EXTRA, rows, cols)
    x, y, scale, bias, row_bias, col_bias = operands
    rows, cols = with_vector_scales(rows, len(x)), with_vector_scales(cols, len(x))
    found: list[Gathered] = []
    if rows:
        directed = [(1, each) for each in rows]
        metadata = Metadata.of(directed)
        shards, (all_y, all_bias) = _gathered(exchange, y, col_bias)
        of_rows = sum(layout.rows[: layout.rank])
        parts = {id(each): _of_all(each, shards, exchange) for each in metadata.cols}
        block = Block(of_rows, 0, shards.total, {id(each): each for each in metadata.rows}, parts)
        placed = [each for _, each in block.place(directed)]
        found.append(Gathered(Operands(x, all_y, scale, bias, row_bias, all_bias), placed, []))
    if cols:
        directed = [(0, each) for each in cols]
        metadata = Metadata.of(directed)
        shards, (all_x, all_bias) = _gathered(exchange, x, row_bias)
        if operands.per_row_scale:
            _, (all_scale,) = gather(scale.unsqueeze(1), group=exchange.group)
            scale = all_scale.squeeze(1)
        of_cols = sum(layout.cols[: layout.rank])
        parts = {id(each): _of_all(each, shards, exchange) for each in metadata.rows}
        block = Block(0, of_cols, len(y), parts, {id(each): each for each in metadata.cols})
        placed = [each for _, each in block.place(directed)]
        found.append(Gathered(Operands(all_x, y, scale, bias, all_bias, col_bias), [], placed))
    return found


def _gathered(exchange: Exchange, features: Tensor, bias: Tensor | None) -> tuple[Shards, tuple[Tensor, Tensor | None]]:
    shards, (everyone,) = gather(features, group=exchange.group, wire_dtype=exchange.wire_dtype)
    if bias is None:
        return shards, (everyone, None)
    _, (biases,) = gather(bias.unsqueeze(1), group=exchange.group)
    return shards, (everyone, biases.squeeze(1))


def _of_all(metadata: Tensor, shards: Shards, exchange: Exchange) -> Tensor:
    """All ranks' part of a tensor [n] or [n, D] that takes no gradient."""
    if metadata.dim() == 1:
        return gather_ids(metadata.detach(), shards)
    _, (everyone,) = gather(metadata.detach(), group=exchange.group)
    return everyone
