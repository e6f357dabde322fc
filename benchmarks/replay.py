"""Seconds that have been measured already, told to pytest-benchmark: interleaved rounds, or those of CUDA events."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_now = 0.0


def measured_time() -> float:
    """A timer that stands still but for what is replayed."""
    return _now


def replayed(seconds: Sequence[float]) -> Callable[[], None]:
    """A function whose next calls take that long by `measured_time`."""
    remaining = list(seconds)

    def call() -> None:
        global _now
        _now += remaining.pop(0)

    return call
