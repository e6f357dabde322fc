"""What the rows of a run share: the device, the seconds that are left, and the folder of results."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..report import table
from .device import CudaDevice, Device
from .environment import environment
from .measure import DeviceLost, GpuCase, GpuResult, Measurement, RowFailed

#: With less than this a row is not begun.
_LEAST_SECONDS = 5.0


class TimeSpent(Exception):
    """The run's seconds are over before a row begins."""


@dataclass(frozen=True)
class Budget:
    """Seconds of a row, and of all of them (a row that begins late has what is left); who is left out."""

    row_seconds: float = 30.0
    seconds: float = 420.0
    without: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls) -> Budget:
        def given(name: str, default: object) -> str:
            return os.environ.get(f"PAIRTILE_BENCH_GPU_{name}", str(default))

        without = tuple(name.strip() for name in given("WITHOUT", "").split(",") if name.strip())
        return cls(float(given("ROW_SECONDS", cls.row_seconds)), float(given("SECONDS", cls.seconds)), without)


@dataclass
class Run:
    """Measures rows one after the other and keeps the folder up to date.

    Attributes:
        folder: for table.txt and environment.json; None: nothing is written.
        budget: its seconds count from the first row on.
        make_device: called when the first row begins.
        options: more of `Measurement`'s arguments.
    """

    folder: Path | None
    budget: Budget = field(default_factory=Budget)
    make_device: Callable[[], Device] = CudaDevice
    options: dict[str, Any] = field(default_factory=dict)
    results: list[GpuResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    _device: Device | None = None
    _end: float = 0.0

    def measure(self, case: GpuCase) -> GpuResult:
        """Measure one row.

        Raises:
            TimeSpent: there is no time for it.
            RowFailed, DeviceLost: as `Measurement`.
        """
        if self._device is None:
            self._device, self._end = self.make_device(), time.monotonic() + self.budget.seconds
            self.environment["before"] = environment()
        seconds = min(self.budget.row_seconds, self._end - time.monotonic())
        if seconds < min(_LEAST_SECONDS, self.budget.row_seconds):
            raise TimeSpent(f"not run: {self.budget.seconds:g} s were spent (PAIRTILE_BENCH_GPU_SECONDS)")
        measurement = Measurement(case, self._device, seconds, without=self.budget.without, **self.options)
        try:
            result = measurement.result()
        except (RowFailed, DeviceLost) as error:
            self.failures.append(str(error))
            self._write()
            raise
        self._device.free()
        self.results.append(result)
        self.failures += [f"{case.name}: {name}: {reason}" for name, reason in result.failures.items()]
        self._write()
        return result

    def lines(self) -> Iterator[str]:
        yield from table(self.results)
        yield from (f"FAILED {failure}" for failure in self.failures)

    def _write(self) -> None:
        # After every row: a run that is interrupted leaves what it has.
        if self.folder is None:
            return
        self.environment["after"] = environment()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "table.txt").write_text("\n".join(self.lines()) + "\n")
        (self.folder / "environment.json").write_text(json.dumps(self.environment, indent=2) + "\n")
