"""Time and memory against a size, both axes logarithmic, with the floor drawn in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .families import Series
from .results import Row
from .theme import Look, Theme, bare, canvas, looks
from .words import round_duration, round_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_PER_LINE = 4
#: Characters that one line of a legend holds, seven for each line and marker.
_LEGEND = 130


def draw_time_and_memory(series: Series, theme: Theme) -> Canvas:
    """Two panels of one series."""
    figure = canvas(10.4, 4.1)
    left, right = figure.subplots(1, 2)
    known = _looks([series], theme)
    _draw(left, series.rows, series.key, known, theme, memory=False)
    _draw(right, series.rows, series.key, known, theme, memory=True)
    left.set_title("Time of a call")
    right.set_title("Peak memory above the inputs")
    _legend(figure, left)
    return figure


def draw_time(facets: Sequence[Series], theme: Theme) -> Canvas:
    """A panel for each series of a case, all with one scale."""
    columns = min(len(facets), _PER_LINE)
    lines = math.ceil(len(facets) / columns)
    figure = canvas(10.4 if columns > 1 else 6.4, 3.1 * lines + 0.6)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    known = _looks(facets, theme)
    for panel, each in zip(panels, facets):
        _draw(panel, each.rows, each.key, known, theme, memory=False)
        panel.set_title(each.fixed or each.case)
    for unused in figure.axes[len(facets) :]:
        unused.set_visible(False)
    _legend(figure, figure.axes[0])
    return figure


def _looks(facets: Sequence[Series], theme: Theme) -> dict[str, Look]:
    rows = [row for each in facets for row in each.rows]
    contenders = [each for row in rows for each in row.contenders.values()]
    return dict(looks(contenders, {row.subject for row in rows}, theme))


def _draw(axes: Axes, rows: Sequence[Row], key: str, known: dict[str, Look], theme: Theme, *, memory: bool) -> None:
    for name, look in known.items():
        there = [row for row in rows if name in row.contenders]
        if memory:
            there = [row for row in there if row.contenders[name].peak_bytes]
        mine = any(row.subject == name for row in rows)
        sizes = [row.sizes[key] for row in there]
        values = [row.contenders[name].peak_bytes if memory else row.contenders[name].median for row in there]
        axes.plot(
            sizes,
            [value or 0 for value in values],
            label=name,
            color=look.color,
            marker=look.marker,
            markersize=6.5 if mine else 5,
            linewidth=2.6 if mine else 1.5,
            linestyle="--" if look.dashed else "-",
            zorder=4 if mine else 3,
        )
        if not memory:
            low, high = zip(*(row.contenders[name].quartiles for row in there))
            axes.fill_between(sizes, low, high, color=look.color, alpha=0.15, linewidth=0)
    if not memory:
        axes.plot(
            [row.sizes[key] for row in rows],
            [row.floor_seconds for row in rows],
            label="floor",
            color=theme.muted,
            linestyle=":",
            linewidth=1.8,
            zorder=2,
        )
    _scales(axes, [row.sizes[key] for row in rows], key, memory=memory)


def _scales(axes: Axes, sizes: Sequence[int], key: str, *, memory: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    bare(axes)
    axes.set_xticks(sorted(set(sizes)), [f"{each:,}" for each in sorted(set(sizes))])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_formatter(NullFormatter())
    written = (lambda value, _: round_size(value)) if memory else (lambda value, _: round_duration(value))
    axes.yaxis.set_major_formatter(FuncFormatter(written))
    axes.set_xlabel(key)
    axes.margins(x=0.12, y=0.08)


def _legend(figure: Canvas, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    ncols = len(labels) if len(labels) * 7 + sum(map(len, labels)) <= _LEGEND else math.ceil(len(labels) / 2)
    figure.legend(handles, labels, loc="outside upper left", ncols=ncols, handlelength=2.4)
