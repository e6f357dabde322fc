"""Markdown tables: one line for each row, one table for each row's contenders, the runs behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .results import Contender, Row, Run
from .spread import REPEATABLE
from .words import duration, error, percent, size, times


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is a name, the others are figures."""

    titles: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        rule = ["---", *("---:" for _ in self.titles[1:])]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in self.lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.titles, rule, *escaped))


def summary(rows: Sequence[Row]) -> Table:
    """Ours, the best other and the floor, with the ratios of time and memory and the worst gradient's error."""
    titles = (
        "row",
        "pairtile",
        "best other",
        "its time",
        "ratio",
        "memory",
        "memory ratio",
        "floor",
        "of floor",
        "error",
    )
    return Table(titles, tuple(_summary_line(row) for row in rows))


def _summary_line(row: Row) -> tuple[str, ...]:
    ours, best = row.ours, row.best_other
    return (
        row.title,
        duration(ours.median),
        best.name if best else "-",
        duration(best.median) if best else "-",
        ratio_text(row, best) if best else "-",
        size(ours.peak_bytes),
        times(best.peak_bytes / ours.peak_bytes) if best and best.peak_bytes and ours.peak_bytes else "-",
        duration(row.floor_seconds),
        f"{row.floor_seconds / ours.median:.0%}",
        error(ours.gradient_error if ours.gradient_error is not None else ours.value_error),
    )


def contenders(row: Row) -> Table:
    """Everybody in one row."""
    titles = ("contender", "median", "quartiles", "x ours", "of floor", "peak", "value", "gradient")
    return Table(titles, tuple(_contender_line(row, each) for each in row.contenders.values()))


def _contender_line(row: Row, each: Contender) -> tuple[str, ...]:
    low, high = each.quartiles
    return (
        each.name,
        duration(each.median),
        f"{duration(low)} to {duration(high)}" if len(each.seconds) > 1 else "one round",
        ratio_text(row, each),
        f"{row.floor_seconds / each.median:.0%}",
        size(each.peak_bytes),
        error(each.value_error),
        error(each.gradient_error),
    )


def ratio_text(row: Row, each: Contender) -> str:
    """With the mark of `spread.is_noisy`."""
    if each.name == row.subject:
        return "1"
    if min(len(each.seconds), len(row.ours.seconds)) < 2:
        return f"one round, {times(row.ratio(each.name))}"
    uncertain = row.uncertainty(each.name)
    return (f"noisy ±{percent(uncertain)}, " if uncertain > REPEATABLE else "") + times(row.ratio(each.name))


def runs(rows: Iterable[Row]) -> Table:
    """Where the figures come from."""
    found: dict[Run, list[Row]] = {}
    for row in rows:
        found.setdefault(row.run, []).append(row)
    titles = ("file", "date", "machine", "place", "torch", "commit", "command", "rows")
    return Table(titles, tuple(_run_line(run, of_run) for run, of_run in found.items()))


def _run_line(run: Run, rows: Sequence[Row]) -> tuple[str, ...]:
    return (
        run.file,
        run.date[:16].replace("T", " "),
        run.machine,
        ", ".join(dict.fromkeys(row.place for row in rows)),
        ", ".join(dict.fromkeys(row.torch or "not recorded" for row in rows)),
        run.commit or "not recorded",
        run.command or "not recorded",
        str(len(rows)),
    )


def provenance(rows: Sequence[Row]) -> list[str]:
    """For each run a line of a caption: on what, with what, when and how."""
    lines = []
    for run in dict.fromkeys(row.run for row in rows):
        mine = [row for row in rows if row.run == run]
        places = ", ".join(dict.fromkeys(row.place for row in mine))
        versions = ", ".join(dict.fromkeys(f"torch {row.torch}" if row.torch else "torch not recorded" for row in mine))
        how = f"`{run.command}`" if run.command else f"command not recorded, {run.file}"
        lines.append(f"{run.machine}; {places}; {versions}; {run.day}; {how}")
    return lines
