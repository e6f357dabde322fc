"""The forward of the Triton backend: panels of rows within the memory budget, one launch after the other.

For each panel `reduce_tiles` leaves the partial results of every tile, and `merge_partials` joins them. S is multiplied once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .autograd import Settings
from .operands import Operands, pair_scores
from .plan import Plan
from .reductions import LogSumExp, PairScore
from .triton_kernels import launching
from .triton_kernels.fields import fields_of
from .triton_kernels.launches import Launches, panel_length, plain
from .triton_kernels.launching import cdiv
from .triton_kernels.reduce import merge_partials, reduce_tiles

# |S| + ln max(N, M) below this (natural): no sum of exponentials of scores leaves float32.
_CALM = 80.0
# Owners of one program of merge_partials, and how many tiles it joins at a time.
_MERGE_BLOCK, _MERGE_TILES = 64, 16


def forward_results(operands: Operands, plan: Plan, settings: Settings) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The result of each (dimension, reduction) of the plan, and what its backward needs to know."""
    operands = plain(operands)
    with launching.on(operands.x.device):
        fields = fields_of(plan, operands.length(1), operands.length(0), operands.scale)
        launches = Launches(operands, fields, settings)
        merged = _reduce(launches)
    results: list[Tensor] = []
    statistics: list[list[Tensor]] = []
    for (dim, reduction), slot in zip(plan, fields.slots, strict=True):
        if isinstance(reduction, PairScore):
            results.append(pair_scores(operands, reduction.pair, dim, settings.budget).to(operands.scale.dtype))
            statistics.append([])
            continue
        result, shift, total = merged[dim][slot]
        results.append(result)
        statistics.append([shift, total] if isinstance(reduction, LogSumExp) else [])
    return results, statistics


def _reduce(launches: Launches) -> dict[int, list[tuple[Tensor, Tensor, Tensor]]]:
    """(result, shift, total) of each dense slot, by direction."""
    n, m, dense = launches.n, launches.m, launches.fields.dense
    merged = {
        dim: [tuple(launches.empty(owners) for _ in range(3)) for _ in range(dense[dim])]
        for dim, owners in ((1, n), (0, m))
    }
    kinds = {dim: {each[6 - dim]: each[0] for each in launches.fields.fields} for dim in (1, 0)}
    if not n or not m:
        for dim, slots in merged.items():
            for slot, (result, shift, total) in enumerate(slots):
                result.fill_(-math.inf if kinds[dim][slot] == 0 else 0.0)
                shift.zero_(), total.zero_()
        return merged  # type: ignore[return-value]
    if not any(dense.values()):
        return merged  # type: ignore[return-value]
    config = launches.config("reduce", pressure=2 if len(launches.fields.fields) > 1 else 0)
    tiles_n = cdiv(m, config.block_n)
    per_row = 8 * (dense[1] * tiles_n + dense[0] * m / config.block_m)
    panel = panel_length(n, launches.settings.budget / per_row, config.block_m)
    # softplus needs neither maxima nor shifts
    shifted = any(kind == 0 for kind, *_ in launches.fields.fields)
    arguments = launches.tile_arguments(config) | {"calm": _calm(launches) if shifted else None}
    row_partials = launches.empty(dense[1], 2, tiles_n, panel)
    col_partials = launches.empty(dense[0], 2, cdiv(panel, config.block_m), m)
    for start in range(0, n, panel):
        rows = min(panel, n - start)
        tiles_m = cdiv(rows, config.block_m)
        panels = {
            "row_partials": row_partials,
            "col_partials": col_partials,
            "panel": start,
            "panel_rows": rows,
            "tiles_m": tiles_m,
            "tiles_n": tiles_n,
        }
        for calm in (True, False) if shifted else (True,):
            launching.run(reduce_tiles, (tiles_m * tiles_n,), config, arguments | panels | {"CALM": calm})
        for slot, owned in enumerate(merged[1]):
            partials = row_partials.view(-1)[2 * slot * tiles_n * rows :]
            _merge(partials, owned, start, rows, tiles_n, kinds[1][slot], continued=False)
        for slot, owned in enumerate(merged[0]):
            partials = col_partials.view(-1)[2 * slot * tiles_m * m :]
            _merge(partials, owned, 0, m, tiles_m, kinds[0][slot], continued=start > 0)
    return merged  # type: ignore[return-value]


def _merge(
    partials: Tensor, owned: tuple[Tensor, ...], first: int, owners: int, tiles: int, kind: int, continued: bool
) -> None:
    result, shift, total = (each[first : first + owners] for each in owned)
    arguments = {
        "partials": partials,
        "shifts": shift,
        "totals": total,
        "results": result,
        "owners": owners,
        "tiles": tiles,
        "KIND": kind,
        "CONTINUE": continued,
        "BLOCK": _MERGE_BLOCK,
        "TILES": _MERGE_TILES,
    }
    launching.run(merge_partials, (cdiv(owners, _MERGE_BLOCK),), None, arguments)


def _calm(launches: Launches) -> Tensor:
    """int32 []: whether the norms of the features rule out that a sum of exponentials overflows."""
    x, y, scale, *biases = launches.operands
    if launches.fields.weighted:
        return torch.zeros((), dtype=torch.int32, device=launches.device)
    norms = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float32).amax() for each in (x, y)]
    reach = scale.abs().amax() * norms[0] * norms[1]
    for bias in biases:
        if bias is not None:
            reach = reach + bias.abs().amax()
    calm: Tensor = reach < _CALM - math.log(max(launches.n, launches.m))
    return calm.to(torch.int32)
