"""Which rows belong into one plot: a case at several sizes, the rows of a suite, a loss over several ranks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .results import Row

#: A line through fewer sizes than this says nothing about growth.
_LEAST_SIZES = 3
_RANKS = re.compile(r"^(?P<case>.*) on (?P<ranks>\d+) ranks$")


@dataclass(frozen=True)
class Series:
    """A case whose rows differ in one size alone.

    Attributes:
        case: its name.
        key: the size that differs, e.g. "batch".
        fixed: the others, in words; empty if there are none.
        rows: by growing size.
    """

    case: str
    key: str
    fixed: str
    rows: Sequence[Row]

    @property
    def has_memory(self) -> bool:
        """Somebody's peak was measured at two sizes or more."""
        names = [name for row in self.rows for name, each in row.contenders.items() if each.peak_bytes is not None]
        return any(names.count(name) > 1 for name in names)


def series_of(rows: Iterable[Row]) -> list[Series]:
    """Each case at three sizes or more, in which one size differs and the others, torch and the device do not."""
    found: list[Series] = []
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.suite, row.case, row.place, row.torch or "", ",".join(row.sizes)].append(row)
    for group in groups.values():
        for key in group[0].sizes:
            found += _along(group, key)
    return found


def _along(group: Sequence[Row], key: str) -> list[Series]:
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in group:
        lines[", ".join(f"{name} {size:,}" for name, size in row.sizes.items() if name != key)].append(row)
    return [
        Series(group[0].case, key, fixed, sorted(line, key=lambda row: row.sizes[key]))
        for fixed, line in lines.items()
        # the first size of a row is what it is said to grow with
        if len({row.sizes[key] for row in line}) >= _LEAST_SIZES and key == next(iter(group[0].sizes))
    ]


def headline_rows(rows: Sequence[Row], series: Sequence[Series]) -> list[Row]:
    """The rows that stand for their case: of a case drawn over sizes the largest one that somebody else took part in.

    Rows over ranks have a plot of their own.
    """
    drawn = {id(row): each for each in series for row in each.rows}
    largest: dict[tuple[str, str], Row] = {}
    for each in series:
        for row in each.rows:
            key = row.suite, row.case
            if row.others and (key not in largest or row.ours.median > largest[key].ours.median):
                largest[key] = row
    kept = {id(row) for row in largest.values()}
    return [row for row in rows if (id(row) not in drawn or id(row) in kept) and ranks_of(row) is None]


def ranks_of(row: Row) -> tuple[str, int] | None:
    """The case and the number of ranks of a row like "ClipLoss float32 on 2 ranks"; None for a single process."""
    found = _RANKS.match(row.case)
    return (found["case"], int(found["ranks"])) if found else None


def over_ranks(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """For each case that ran over ranks its rows by number of ranks, with that of one process where sizes agree."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if (known := ranks_of(row)) is not None:
            found[f"{known[0]}, {row.sizes_text}"][known[1]] = row
    for row in rows:
        if row.title in found:
            found[row.title].setdefault(1, row)
    return {case: dict(sorted(by_ranks.items())) for case, by_ranks in found.items()}
