"""Regressions, found by pytest-benchmark's own comparison: of ratios to the others of a row, not of absolute times.

    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:15%

pytest-benchmark compares our time with a stored one. Before it does, the stored time is restated: multiplied by how much
longer the row's other contenders took in this run than in the stored one, so that another machine, a slower clock or another
thread count cancels, and by what the spread of both runs leaves uncertain, so that noise fails nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .drawn.results import Contender, Row, row_of
from .drawn.spread import NINE_OF_TEN, relative_deviation
from .replay import replayed

_STORED = pytest.StashKey[list[dict[str, Any]]]()
_CHANGES = pytest.StashKey[list["Change"]]()
#: What pytest-benchmark keeps of a row that is a time.
_TIMES = ("min", "max", "mean", "stddev", "median", "iqr", "q1", "q3", "ld15iqr", "hd15iqr", "total")
#: Of a row of one round, whose spread nobody knows: a half more or less fails nothing.
_UNKNOWN = 0.5


@dataclass(frozen=True)
class Change:
    """A row in this run beside the same row in a stored one.

    Attributes:
        row: as it is in this run.
        yardstick: the others' time over that in the stored run; the floor's in a row of ours alone.
        beside: whose times those are.
        slower: our time over the stored one, over the yardstick: 1.3 is a slowdown of 30%.
        uncertainty: how far `slower` may be off, relative to it, nine times out of ten.
        remark: what else differs.
    """

    row: Row
    yardstick: float
    beside: str
    slower: float
    uncertainty: float
    remark: str


def change_of(then: Row, now: Row) -> Change:
    """The change of a row that both runs have."""
    common = [each.name for each in now.others if each.name in {other.name for other in then.others}]
    if common:
        yardstick = statistics.median(now.contenders[name].median / then.contenders[name].median for name in common)
        beside = ", ".join(common)
        pairs = [_variance(then.contenders[name], now.contenders[name]) for name in common]
        others = sum(pairs) / len(pairs) ** 2
    else:
        yardstick, beside, others = now.floor_seconds / then.floor_seconds, "floor", 0.0
    deviation = math.sqrt(_variance(then.ours, now.ours) + others)
    return Change(
        row=now,
        yardstick=yardstick,
        beside=beside,
        slower=now.ours.median / then.ours.median / yardstick,
        uncertainty=NINE_OF_TEN * deviation if math.isfinite(deviation) else _UNKNOWN,
        remark="" if then.torch == now.torch else f"torch {now.torch}, stored: {then.torch or 'not recorded'}",
    )


def _variance(then: Contender, now: Contender) -> float:
    return relative_deviation(then.seconds) ** 2 + relative_deviation(now.seconds) ** 2


def restate(stats: dict[str, Any], change: Change) -> None:
    """Turns stored times, in place, into the most that they can be expected to be in this run."""
    factor = change.yardstick * (1 + change.uncertainty)
    for name in _TIMES:
        if name in stats:
            stats[name] *= factor


def pytest_benchmark_compare_machine_info(config: pytest.Config, compared_benchmark: dict[str, Any]) -> None:
    """Called with each stored run, before any test."""
    config.stash.setdefault(_STORED, []).append(compared_benchmark)


def tell(config: pytest.Config, benchmark: BenchmarkFixture, info: Mapping[str, Any], seconds: Sequence[float]) -> None:
    """Gives pytest-benchmark a measured row, and restates that row in the runs it is compared with.

    Args:
        config: of the session.
        benchmark: the test's fixture; its timer is `replay.measured_time`.
        info: what `report.record` made of the row.
        seconds: of our first contender, by round.
    """
    benchmark.group = info["case"]
    benchmark.extra_info |= info
    now = row_of({"fullname": benchmark.fullname, "extra_info": info})
    for run in config.stash.get(_STORED, []):
        for stored in run["benchmarks"]:
            if stored["fullname"] == benchmark.fullname and "contenders" in stored["extra_info"]:
                change = change_of(row_of(stored), now)
                restate(stored["stats"], change)
                config.stash.setdefault(_CHANGES, []).append(change)
    benchmark.pedantic(replayed(seconds), rounds=len(seconds))


def changes(config: pytest.Config) -> Iterator[str]:
    """A line for each compared row, the slowest first."""
    for each in sorted(config.stash.get(_CHANGES, []), key=lambda change: -change.slower):
        yield (
            f"{each.slower:5.2f}x ± {each.uncertainty:4.0%}  {each.row.title}  "
            f"(others {each.yardstick:.2f}x: {each.beside}){'; ' + each.remark if each.remark else ''}"
        )
