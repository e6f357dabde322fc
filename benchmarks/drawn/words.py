"""Figures as words: the same units in tables, plots and captions."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Three digits, in the unit that needs no exponent."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e6)} µs"


def size(count: int | None) -> str:
    """In megabytes, as the tables of the benchmarks have them."""
    if count is None:
        return "-"
    if count < 1e5:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e7 else f"{count / 1e6:,.0f} MB"


def round_size(count: float) -> str:
    """A power of ten, for an axis."""
    factor, unit = (1e3, "kB") if count < 1e6 else (1e6, "MB") if count < 1e9 else (1e9, "GB")
    return f"{count / factor:g} {unit}"


def round_duration(seconds: float) -> str:
    """A round number of seconds, for an axis."""
    factor, unit = (1e6, "µs") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1, "s")
    return f"{seconds * factor:g} {unit}"


def error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def times(ratio: float) -> str:
    """A ratio, with a digit more where it is small."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:,.0f}x"


def percent(share: float) -> str:
    """Of an uncertainty: beyond all of the figure more digits say nothing."""
    return f"{share:.0%}" if share <= 1 else ">100%"


def _three_digits(number: float) -> str:
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"
