"""Reductions of a similarity matrix whose rows and columns lie over the ranks of a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.exchange import Exchange
from ..distributed.gathering import gather, gather_ids
from ..distributed.shards import Shards, all_numbers, check_recording
from .autograd import Settings
from .operands import Operands
from .placement import Block, Metadata, with_vector_scales
from .reductions import Reduction, Teacher
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
    flags = [*wanted_by(operands), operands.per_row_scale, torch.is_grad_enabled()]
    table = all_numbers([*mine, *map(int, flags)], exchange.group, x.device, _said(exchange, operands, rows, cols))
    n, m, extra_n, extra_m, *columns = zip(*table, strict=True)
    *wanted, per_row = (any(each) for each in columns[:-1])
    check_recording(columns[-1], wanted)
    if per_row:
        operands = operands._replace(scale=scale.expand(len(x)))
    return Layout(dist.get_rank(exchange.group), n, m, extra_n, extra_m), wanted, operands


def _said(exchange: Exchange, operands: Operands, rows: Sequence[Reduction], cols: Sequence[Reduction]) -> str:
    """What must be the same on all ranks."""
    known: dict[int, int] = {}
    given = [name for name, each in zip(Operands._fields[3:], operands[3:], strict=True) if each is not None]
    how = f"{exchange.strategy} in {exchange.wire_dtype or operands.x.dtype}, nodes of {exchange.node_size or 'all'}"
    asked = [
        f"{name} [{', '.join(_form(each, known) for each in of)}]" for name, of in (("rows", rows), ("cols", cols))
    ]
    features = f"width {operands.x.shape[1]} {operands.x.dtype}"
    return f"{how}: {', '.join([features, *given, *asked])}".replace("torch.", "")


def _form(value: object, known: dict[int, int]) -> str:
    """A reduction, or what it holds, but for the entries and the length of tensors; of a tensor used twice, that it is one."""
    if isinstance(value, (Tensor, Teacher)):
        number = known.setdefault(id(value), len(known))
        if isinstance(value, Tensor):
            return f"tensor {number} {value.dtype}{list(value.shape[1:])}"
        return f"Teacher {number}({', '.join(_form(each, known) for each in (value.x, value.y, value.scale))})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_form(each, known) for each in value)})"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    return f"{type(value).__name__}({', '.join(f'{name}={_form(each, known)}' for name, each in fields if each is not None)})"


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
    # `reference` gathers whatever the strategy.
    exchange = dataclasses.replace(exchange, strategy="gather")
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
