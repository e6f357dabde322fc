"""Time of a step over several processes, by strategy and number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .families import ranks_of
from .results import Contender, Row
from .theme import Theme, bare, canvas, looks
from .words import duration, round_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_WIDTH = 0.8


def draw_ranks(cases: Mapping[str, Mapping[int, Row]], theme: Theme) -> Canvas:
    """A panel for each case: bars by number of ranks, all ranks together doing the same work."""
    figure = canvas(10.4, 0.5 + 3.4 * ((len(cases) + 1) // 2))
    panels = figure.subplots((len(cases) + 1) // 2, 2, squeeze=False).flat
    rows = [row for by_ranks in cases.values() for row in by_ranks.values()]
    over = {name for row in rows if ranks_of(row) for name in row.contenders}
    contenders = [each for row in rows for each in _shown(row, over)]
    known = looks(contenders, {row.subject for row in rows}, theme)
    for panel, (case, by_ranks) in zip(panels, cases.items()):
        _draw(panel, by_ranks, over, {name: look.color for name, look in known.items()}, theme)
        panel.set_title(case)
    for unused in figure.axes[len(cases) :]:
        unused.set_visible(False)
    return figure


def _shown(row: Row, over: set[str]) -> list[Contender]:
    """Of one process ours, and who takes part over ranks as well."""
    return [each for each in row.contenders.values() if each.name == row.subject or each.name in over]


def _draw(axes: Axes, by_ranks: Mapping[int, Row], over: set[str], colors: Mapping[str, str], theme: Theme) -> None:
    bare(axes, "y")
    ticks, labels = [], []
    place = 0.0
    for ranks, row in by_ranks.items():
        shown = _shown(row, over)
        for step, each in enumerate(shown):
            axes.bar(place + step, each.median, width=_WIDTH, color=colors[each.name])
            low, high = each.quartiles
            axes.vlines(place + step, low, high, color=theme.ink, linewidth=1.2)
            axes.annotate(
                f"{each.name}\n{duration(each.median)}",
                (place + step, max(high, each.median)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                bbox={"facecolor": theme.background, "linewidth": 0, "pad": 0.6},
            )
        axes.hlines(row.floor_seconds, place - 0.5, place + len(shown) - 0.5, color=theme.muted, linestyle=":")
        ticks.append(place + (len(shown) - 1) / 2)
        labels.append("1 process" if ranks == 1 else f"{ranks} ranks")
        place += len(shown) + 0.7
    axes.set_xticks(ticks, labels)
    axes.yaxis.set_major_formatter(lambda value, _: round_duration(value) if value else "0")
    axes.margins(y=0.22)
    axes.set_ylim(bottom=0)
