"""Which figures a report has, in which order, and what each says about itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .audit import Audit, draw_audit
from .bars import bars_in, draw_ratios
from .dots import draw_errors, with_errors
from .families import headline_rows, over_ranks, series_of
from .lines import draw_time, draw_time_and_memory
from .ranks import draw_ranks
from .results import Row
from .tables import provenance
from .theme import DARK, LIGHT, Theme, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

#: Bars of one figure: more would not fit on a screen.
_MOST_BARS = 40
_NOISE = (
    "Pale, hatched bars are noisy: the spread of their rounds says that a second run's ratio would be further off than "
    "10% more than one time in ten; ± is how far nine of ten would stay."
)


@dataclass(frozen=True)
class Figure:
    """One plot, on white and on a dark page.

    Attributes:
        name: of its file, without suffix.
        title: what it shows.
        caption: what was measured.
        source: lines: on what, with which versions, when, by which command.
    """

    name: str
    title: str
    caption: str
    source: Sequence[str]
    light: bytes
    dark: bytes


def figures(rows: Sequence[Row], audit: Audit | None) -> list[Figure]:
    """All figures that these rows, and the audit, allow."""
    return [*_ratios(rows), *_growth(rows), *_errors(rows), *_ranks(rows), *_audit(audit)]


def _ratios(rows: Sequence[Row]) -> Iterator[Figure]:
    headline = headline_rows(rows, series_of(rows))
    for suite in dict.fromkeys(row.suite for row in headline):
        parts = _split([row for row in headline if row.suite == suite])
        for number, part in enumerate(parts, 1):
            caption = (
                "Medians of interleaved rounds on the same inputs. Bars: a contender's time over that of pairtile, the "
                "first line of each row; a mark on it is the floor of the row's work. Dots: peak memory of one call above "
                f"its inputs, gradients included, where it was measured. {_NOISE}"
            )
            title = f"{_named(suite)}: time and memory beside others"
            more = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
            yield _figure(f"ratios_{suite}{number if len(parts) > 1 else ''}", title + more, caption, part,
                          partial(draw_ratios, part))  # fmt: skip


def _split(rows: Sequence[Row]) -> list[list[Row]]:
    parts: list[list[Row]] = []
    for row in rows:
        if not parts or bars_in([*parts[-1], row]) > _MOST_BARS:
            parts.append([])
        parts[-1].append(row)
    return parts


def _growth(rows: Sequence[Row]) -> Iterator[Figure]:
    series = series_of(rows)
    common = (
        "Medians of interleaved rounds; shades are the quartiles, the dotted line is the floor. Both axes logarithmic."
    )
    for each in series:
        if each.has_memory:
            at = f", {each.fixed}" if each.fixed else ""
            caption = f"{common} Memory: peak of one call above its inputs, gradients included."
            title = f"{each.case}{at}: time and memory against the {each.key}"
            name = f"growth_{each.case}_{each.fixed}"
            yield _figure(name, title, caption, each.rows, partial(draw_time_and_memory, each))
    for case in dict.fromkeys((each.rows[0].suite, each.case) for each in series):
        facets = [each for each in series if (each.rows[0].suite, each.case) == case and not each.has_memory]
        if facets:
            drawn_rows = [row for each in facets for row in each.rows]
            title = f"{case[1]}: time against the {facets[0].key}"
            yield _figure(f"time_{case[1]}", title, common, drawn_rows, partial(draw_time, facets))


def _errors(rows: Sequence[Row]) -> Iterator[Figure]:
    every = with_errors(headline_rows(rows, series_of(rows)))
    caption = (
        "Relative error against the dense formula in float64, on the same inputs: the norm of the difference over the "
        "norm of the truth, at the sizes written beside each row. Rows of 16 bits start from the same 16-bit inputs, and "
        "who returns gradients in 16 bits rounds them."
    )
    for suite in dict.fromkeys(row.suite for row in every):
        shown = [row for row in every if row.suite == suite]
        title = f"{_named(suite)}: exactness"
        yield _figure(f"errors_{suite}", title, caption, shown, partial(draw_errors, shown))


def _ranks(rows: Sequence[Row]) -> Iterator[Figure]:
    cases = over_ranks(rows)
    if cases:
        caption = (
            "One step of a loss, forward and backward, over several processes on this machine (gloo), which share its cores; "
            "the same global batch whatever the number. Lines on the bars are quartiles, the dotted line is the floor "
            "of the whole batch on all cores."
        )
        shown = [row for by_ranks in cases.values() for row in by_ranks.values()]
        yield _figure("ranks", "Over ranks", caption, shown, partial(draw_ranks, cases))


def _audit(audit: Audit | None) -> Iterator[Figure]:
    if audit is not None and audit.bounds:
        caption = (
            "Not a timing: read off the machine code of the Triton kernels, all launches of a phase. FLOPs that the phase "
            "needs, over what the tensor cores could do in the clocks that its instructions take: between a schedule that "
            "overlaps nothing and one that overlaps all. Memory and latency are in neither."
        )
        source = [f"`python -m benchmarks.audit --json {audit.file}`; Triton {audit.triton}; {audit.date[:10]}; no GPU"]
        draw = partial(draw_audit, audit)
        yield Figure("audit", "What the GPU kernels allow", caption, source, drawn(draw, LIGHT), drawn(draw, DARK))


def _figure(name: str, title: str, caption: str, rows: Sequence[Row], draw: Callable[[Theme], Canvas]) -> Figure:
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return Figure(slug, title, caption, provenance(rows), drawn(draw, LIGHT), drawn(draw, DARK))


def _named(suite: str) -> str:
    return suite.replace("_", " ").capitalize()
