"""Connects the harness with pytest-benchmark: one fixture, the table at the end of a run, the bars."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .floor import FloorMeter
from .harness import Case, Result, measure
from .regressions import changes, pytest_benchmark_compare_machine_info, tell  # noqa: F401  (the hook)
from .replay import measured_time
from .report import record, summary, table
from .selection import asked_for, is_short

_RESULTS = pytest.StashKey[list[Result]]()

#: Machines that are shared miss bars for reasons of their own: by default the table says so, and nothing fails.
_BARS_FAIL = os.environ.get("PAIRTILE_BENCH_BARS") == "1"
_SETTINGS = ("PAIRTILE_BENCH_", "BENCH_FULL", "OMP_NUM_THREADS")
_FLOOR_SECONDS = float(os.environ.get("PAIRTILE_BENCH_FLOOR_SECONDS", "0.1"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not asked_for(config):
        config.hook.pytest_deselected(items=[each for each in items if not is_short(each)])
        items[:] = [each for each in items if is_short(each)]
    # The rounds have been measured, interleaved, when pytest-benchmark hears of them.
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=measured_time))


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What a reader of the figures would have to type."""
    told = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_SETTINGS)]
    arguments = [each for each in config.invocation_params.args if not str(each).startswith("--benchmark-")]
    output_json["pairtile"] = {"command": shlex.join([*told, "pytest", *map(str, arguments)])}


@pytest.fixture
def measure_row(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[[Case], Result]:
    """Measures a case and leaves everything in the JSON and in the table."""

    def run(case: Case) -> Result:
        result = measure(case, FloorMeter(case.work.dtype, _FLOOR_SECONDS, read_only=case.work.read_only))
        request.config.stash[_RESULTS].append(result)
        tell(request.config, benchmark, record(result), result.measured[result.subject].seconds)
        result.call = None
        missed = [bar.text for bar in result.judgements if not bar.met]
        if _BARS_FAIL and missed:
            pytest.fail(f"{case.name}: {'; '.join(missed)}", pytrace=False)
        return result

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    if results:
        terminalreporter.section("pairtile: times in ms (columns: benchmarks/README.md)")
        for line in table(results):
            terminalreporter.write_line(line)
        terminalreporter.section("pairtile, the best other and the floor")
        for line in summary(results):
            terminalreporter.write_line(line)
    if compared := list(changes(config)):
        terminalreporter.section("our time over the stored one, over the change of the others")
        for line in compared:
            terminalreporter.write_line(line)
