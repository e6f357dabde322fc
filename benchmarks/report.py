"""What a run leaves behind: a table in the terminal, and everything in pytest-benchmark's JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from .drawn.results import Row, row_of
from .drawn.spread import is_noisy
from .drawn.tables import summary as summary_of
from .harness import Measured, Result

_TITLES = ("contender", "median", "min", "max", "IQR", "x ours", "of floor", "peak", "value", "gradient", "bars")


def record(result: Result) -> dict[str, Any]:
    """The whole of a result, in what JSON can hold; times in seconds, sizes in bytes."""
    case, floor = result.case, result.floor
    described = {each.name: each for each in case.contenders}
    work = asdict(case.work) | {"dtype": _short(case.work.dtype)}
    return {
        "case": case.name,
        "sizes": dict(case.sizes),
        "threads": result.threads,
        "place": result.place,
        "torch": torch.__version__,
        "ours": result.subject,
        "contenders": {
            name: asdict(each)
            | {"median": each.median, "share_of_floor": result.share(name)}
            | {"ours": described[name].ours, "comparable": described[name].comparable}
            for name, each in result.measured.items()
        },
        "matrix_gradients": list(case.matrix_gradients),
        "missing": result.missing,
        "error_sizes": dict(case.error_sizes or case.sizes),
        "gradient_bytes": result.gradient_bytes,
        "work": work,
        "floor": asdict(floor) | {"seconds": result.floor_seconds()},
        "bars": [asdict(each) for each in result.judgements],
    }


def table(results: Iterable[Result]) -> Iterator[str]:
    """Lines: a head and one line per contender for each row, then how the bars fared."""
    results = list(results)
    lines = [[_contender_line(each, name) for name in each.measured] for each in results]
    everything = [_TITLES, *(line for block in lines for line in block)]
    widths = [max(len(line[column]) for line in everything) for column in range(len(_TITLES))]
    for result, block in zip(results, lines):
        yield from _head(result)
        for line in (_TITLES, *block):
            yield "  " + _aligned(line, widths)
        for name, reason in result.missing.items():
            yield f"  {name}: {reason}"
        yield from (f"  {remark}" for remark in result.remarks)
        yield ""
    yield from _bars(results)


def summary(results: Iterable[Result]) -> Iterator[str]:
    """One line for each row: ours, the best other and the floor, with ratios and error."""
    rows = [_read_back(each) for each in results]
    made = summary_of(rows)
    widths = [max(len(line[column]) for line in (made.titles, *made.lines)) for column in range(len(made.titles))]
    for line in (made.titles, *made.lines):
        first, *others = line
        yield "  ".join([first.ljust(widths[0]), *(each.rjust(width) for each, width in zip(others, widths[1:]))])


def _read_back(result: Result) -> Row:
    return row_of({"fullname": result.case.name, "extra_info": record(result)})


def _head(result: Result) -> Iterator[str]:
    case, floor, work = result.case, result.floor, result.case.work
    sizes = ", ".join(f"{name} {size}" for name, size in case.sizes.items())
    place = result.place or f"{result.threads} threads"
    yield f"{case.name}: {sizes}; {place}, torch {torch.__version__}, {case.rounds} rounds"
    # Both in one unit, in which a CPU has hundreds and a GPU has thousands at most.
    unit, prefix = (1e9, "G") if floor.flops_per_second < 1e13 else (1e12, "T")
    yield (
        f"  floor {_milliseconds(result.floor_seconds())} ms: {work.flops / unit:.3g} {prefix}FLOP ({work.formula}) at "
        f"{floor.flops_per_second / unit:.0f} {prefix}FLOP/s ({floor.source}, {_short(work.dtype)}), "
        f"{work.least_bytes / 1e6:.3g} MB at {floor.bytes_per_second / 1e9:.1f} GB/s"
    )
    notes = []
    if result.gradient_bytes and any(each.peak_bytes is not None for each in result.measured.values()):
        notes.append(f"{result.gradient_bytes / 1e6:.3g} MB of each peak are gradients")
    if case.error_sizes is not None and dict(case.error_sizes) != dict(case.sizes):
        where = ", ".join(f"{name} {size}" for name, size in case.error_sizes.items())
        notes.append(f"errors measured at {where}")
    if notes:
        yield "  " + "; ".join(notes)


def _contender_line(result: Result, name: str) -> tuple[str, ...]:
    each = result.measured[name]
    mine = [bar.text for bar in result.judgements if (bar.beside or result.subject) == name]
    # What belongs to a contender that is not there is said beside ours.
    if name == result.subject:
        mine += [bar.text for bar in result.judgements if bar.beside is not None and bar.beside in result.missing]
    return (
        name,
        _milliseconds(each.median),
        _milliseconds(min(each.seconds)),
        _milliseconds(max(each.seconds)),
        _milliseconds(each.interquartile),
        f"{each.median / result.median():.2f}{_noise(result, name)}",
        f"{result.share(name):.0%}",
        "-" if each.peak_bytes is None else _megabytes(each.peak_bytes),
        *_errors(each, result),
        "; ".join(mine),
    )


def _noise(result: Result, name: str) -> str:
    """The mark of a ratio that a second run need not repeat."""
    ours = result.measured[result.subject].seconds
    return " noisy" if name != result.subject and is_noisy(ours, result.measured[name].seconds) else ""


def _errors(each: Measured, result: Result) -> tuple[str, str]:
    """Of the value, and the worst one of the gradients of matrices.

    Gradients of the scale and the bias are sums that pass through zero, where a relative error says nothing; they
    are in the JSON.
    """
    if not each.errors:
        return "-", "-"
    gradients = [error for name, error in each.errors.items() if name in result.case.matrix_gradients]
    return f"{each.errors[result.case.results[0]]:.0e}", f"{max(gradients):.0e}" if gradients else "-"


def _bars(results: list[Result]) -> Iterator[str]:
    judged = [(result, bar) for result in results for bar in result.judgements]
    met = sum(bar.met is True for _, bar in judged)
    if judged:
        yield f"bars: {met} of {len(judged)} met"
    for result, bar in judged:
        if not bar.met:
            sizes = ", ".join(f"{name} {size}" for name, size in result.case.sizes.items())
            yield f"  {result.case.name} ({sizes}): {bar.text}"


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    first, *numbers, last = line
    middle = [each.rjust(width) for each, width in zip(numbers, widths[1:])]
    return "  ".join([first.ljust(widths[0]), *middle, last]).rstrip()


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
