"""The forward of the Triton backend: panels of rows within the memory budget, one launch after the other.

For each panel `reduce_tiles` leaves the partial results of every tile, and `merge_partials` joins them; the largest
scores are joined by `triton_chosen.py`. S and every teacher are multiplied once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .autograd import Settings
from .operands import Operands, pair_scores
from .plan import Plan
from .reductions import Chosen, PairScore
from .torch_reductions import STATISTICS
from .triton_chosen import Largest
from .triton_kernels import launching
from .triton_kernels.chosen import PICKED
from .triton_kernels.configurations import Config
from .triton_kernels.fields import fields_of
from .triton_kernels.launches import Launches, panel_length, plain, reach
from .triton_kernels.launching import cdiv
from .triton_kernels.reduce import merge_partials, reduce_tiles

# |S| + ln max(N, M) below this (natural): no sum of exponentials of scores leaves float32.
_CALM = 80.0
# Owners of one program of merge_partials, and how many tiles it joins at a time.
_MERGE_BLOCK, _MERGE_TILES = 64, 16


def forward_results(operands: Operands, plan: Plan, settings: Settings) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The results of each (dimension, reduction) of the plan, and what its backward needs to know."""
    operands = plain(operands)
    with launching.on(operands.x.device):
        fields = fields_of(plan, operands.length(1), operands.length(0), operands.scale)
        sweep = _Reduction(Launches(operands, fields, settings))
        sweep.run()
        results: list[Tensor] = []
        statistics: list[list[Tensor]] = []
        for (dim, reduction), slot in zip(plan, fields.slots, strict=True):
            kept: list[Tensor] = []
            if isinstance(reduction, PairScore):
                own = pair_scores(operands, reduction.pair, dim, settings.budget)
                results.append(own.to(operands.scale.dtype))
            elif isinstance(reduction, Chosen):
                results += sweep.largest[dim][slot].results()
            else:
                result, *kept = sweep.sums[dim][slot]
                results.append(result)
            statistics.append(kept[: STATISTICS[type(reduction)]])
    return results, statistics


class _Reduction:
    """The forward: one panel of rows after the other.

    Attributes:
        sums: of each slot of sums, by direction, (result, shift, total), and a mean's own in base 2.
        largest: of each slot of largest scores.
    """

    def __init__(self, launches: Launches) -> None:
        self._launches = launches
        fields = launches.fields
        self._kinds = {dim: {each[6 - dim]: each.kind for each in fields.fields if each.kind != 6} for dim in (1, 0)}
        lengths = {1: launches.n, 0: launches.m}
        self.sums = {
            dim: [
                tuple(launches.empty(lengths[dim]) for _ in range(4 if self._kinds[dim][slot] == 3 else 3))
                for slot in range(fields.dense[dim])
            ]
            for dim in (1, 0)
        }
        self.largest = {
            dim: [Largest(k, dim, lengths[dim], lengths[1 - dim], launches) for k in fields.chosen[dim]]
            for dim in (1, 0)
        }
        self._parts = 3 if fields.means else 2

    def run(self) -> None:
        """Fills all of them."""
        launches = self._launches
        if not launches.n or not launches.m:
            for dim, slots in self.sums.items():
                for slot, each in enumerate(slots):
                    each[0].fill_(-math.inf if self._kinds[dim][slot] == 0 else 0.0)
                    for statistic in each[1:]:
                        statistic.zero_()
        elif launches.fields.fields:
            self._sweep(launches.config("reduce", pressure=launches.fields.pressure))

    def _sweep(self, config: Config) -> None:
        launches = self._launches
        n, m, dense = launches.n, launches.m, launches.fields.dense
        tiles_n = cdiv(m, config.block_n)
        panel = panel_length(n, launches.settings.budget / self._bytes_per_row(config), config.block_m)
        variants, calm = self._variants()
        arguments = launches.tile_arguments(config) | {"calm": calm, "PARTS": self._parts, "ALL_KEYS": PICKED}
        row_partials = launches.empty(dense[1], self._parts, tiles_n, panel)
        col_partials = launches.empty(dense[0], self._parts, cdiv(panel, config.block_m), m)
        for start in range(0, n, panel):
            rows = min(panel, n - start)
            tiles_m = cdiv(rows, config.block_m)
            keys = {
                dim: tuple(each.buffer(rows, m, tiles, block) for each in self.largest[dim]) or None
                for dim, tiles, block in ((1, tiles_n, config.block_n), (0, tiles_m, config.block_m))
            }
            panels = {
                "row_partials": row_partials,
                "col_partials": col_partials,
                "row_keys": keys[1],
                "col_keys": keys[0],
                "panel": start,
                "panel_rows": rows,
                "tiles_m": tiles_m,
                "tiles_n": tiles_n,
            }
            for each in variants:
                launching.run(reduce_tiles, (tiles_m * tiles_n,), config, arguments | panels | {"CALM": each})
            self._merge(1, row_partials, start, rows, tiles_n, continued=False)
            self._merge(0, col_partials, 0, m, tiles_m, continued=start > 0)
            for dim in (1, 0):
                for largest, found in zip(self.largest[dim], keys[dim] or (), strict=True):
                    largest.add(found)

    def _bytes_per_row(self, config: Config) -> float:
        """Of partial results."""
        m, dense = self._launches.m, self._launches.fields.dense
        tiles_n = cdiv(m, config.block_n)
        sums = 4 * self._parts * (dense[1] * tiles_n + dense[0] * m / config.block_m)
        keys = [
            *(each.per_row(tiles_n, config.block_n) for each in self.largest[1]),
            *(each.per_row(m / config.block_m, config.block_m) for each in self.largest[0]),
        ]
        return sums + sum(keys)

    def _variants(self) -> tuple[tuple[bool, ...], Tensor | None]:
        """Which of `reduce_tiles` are launched, and what chooses between two."""
        exponential = [each for each in self._launches.fields.fields if each.exponential]
        if not exponential:
            return (True,), None
        if all(each.plain for each in exponential):
            return (True, False), _calm(self._launches)
        return (False,), None

    def _merge(self, dim: int, partials: Tensor, first: int, owners: int, tiles: int, continued: bool) -> None:
        for slot, owned in enumerate(self.sums[dim]):
            result, shift, total, *mean = (each[first : first + owners] for each in owned)
            arguments = {
                "partials": partials.view(-1)[self._parts * slot * tiles * owners :],
                "shifts": shift,
                "totals": total,
                "means": mean[0] if mean else None,
                "results": result,
                "owners": owners,
                "tiles": tiles,
                "KIND": self._kinds[dim][slot],
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
    calm: Tensor = reach(x, y, scale, biases) < _CALM - math.log(max(launches.n, launches.m))
    return calm.to(torch.int32)
