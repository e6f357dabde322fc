"""Connects the rows with pytest: the fixture, pytest-benchmark's JSON, and the table beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ..regressions import tell
from ..report import record
from .device import missing_device
from .measure import DeviceLost, GpuCase, RowFailed
from .run import Budget, Run, TimeSpent

_FOLDER = Path(__file__).resolve().parent
_RUN = pytest.StashKey[Run]()


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("benchmark_json", None)
    config.stash[_RUN] = Run(Path(given).parent if given else None, Budget.from_environment())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Rows run where there is a GPU, and where they are asked for: `pytest benchmarks` stays the CPU's suite."""
    reason = missing_device()
    if reason is None and not _asked_for(config):
        reason = "for GPUs: make bench-gpu, or pytest benchmarks/gpu"
    for item in items:
        if reason and _FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def _asked_for(config: pytest.Config) -> bool:
    given = [Path(each.split("::")[0]).resolve() for each in config.args]
    return "gpu" in config.option.markexpr or any(_FOLDER in (path, *path.parents) for path in given)


@pytest.fixture
def measure_row(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[[GpuCase], None]:
    """Measures a case; everything goes into the JSON and into the table, and failures of ours fail the test."""

    def measure(case: GpuCase) -> None:
        try:
            result = request.config.stash[_RUN].measure(case)
        except TimeSpent as reason:
            pytest.skip(str(reason))
        except RowFailed as error:
            pytest.fail(str(error), pytrace=False)
        except DeviceLost as error:
            # Nothing works in this process any more; the rows before this one are in the table.
            pytest.exit(str(error), returncode=1)
        tell(request.config, benchmark, record(result), result.measured[result.subject].seconds)
        if result.failures:
            pytest.fail("; ".join(f"{name}: {reason}" for name, reason in result.failures.items()), pytrace=False)

    return measure


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["gpu"] = config.stash[_RUN].environment


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[_RUN]
    if run.results or run.failures:
        terminalreporter.section("pairtile on a GPU: times in ms (columns: benchmarks/gpu/README.md)")
        for line in run.lines():
            terminalreporter.write_line(line)
