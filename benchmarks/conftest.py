"""Connects the harness with pytest-benchmark: one fixture, the table at the end of a run, the bars."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .floor import FloorMeter
from .harness import Case, Result, measure
from .report import record, table

_RESULTS = pytest.StashKey[list[Result]]()

#: Machines that are shared miss bars for reasons of their own: by default the table says so, and nothing fails.
_BARS_FAIL = os.environ.get("PAIRTILE_BENCH_BARS") == "1"
_FLOOR_SECONDS = float(os.environ.get("PAIRTILE_BENCH_FLOOR_SECONDS", "0.1"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = []


@pytest.fixture
def measure_row(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[[Case], Result]:
    """Measures a case and leaves everything in the JSON and in the table."""

    def run(case: Case) -> Result:
        result = measure(case, FloorMeter(case.work.dtype, _FLOOR_SECONDS, read_only=case.work.read_only))
        request.config.stash[_RESULTS].append(result)
        benchmark.group = case.name
        benchmark.extra_info |= record(result)
        # pytest-benchmark's own statistics are those of our call alone, for --benchmark-compare from run to run.
        calls = result.measured[result.subject].calls_per_round
        benchmark.pedantic(result.call, rounds=case.rounds, iterations=calls)
        result.call = None
        missed = [bar.text for bar in result.judgements if not bar.met]
        if _BARS_FAIL and missed:
            pytest.fail(f"{case.name}: {'; '.join(missed)}", pytrace=False)
        return result

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    if results:
        terminalreporter.section("pairtile: times in ms, forward and backward (columns: benchmarks/README.md)")
        for line in table(results):
            terminalreporter.write_line(line)
