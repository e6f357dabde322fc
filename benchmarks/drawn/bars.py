"""Bars of how many times our time each contender takes, and the memory of each beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .results import Contender, Row
from .spread import REPEATABLE
from .theme import Theme, bare, canvas, role_color, role_legend
from .words import duration, percent, round_size, size, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

#: Longer bars are cut: past this the others could not be told apart.
_LONGEST = 12.0
_INCHES = 0.22


@dataclass(frozen=True)
class _Bar:
    """One contender of one row, at its height."""

    row: Row
    contender: Contender
    y: float

    @property
    def noisy(self) -> bool:
        return self.contender.name != self.row.subject and self.row.uncertainty(self.contender.name) > REPEATABLE


def bars_in(rows: Sequence[Row]) -> int:
    """How many bars a figure of these rows has."""
    return sum(len(row.contenders) for row in rows)


def draw_ratios(rows: Sequence[Row], theme: Theme) -> Canvas:
    """A group of bars for each row: time over ours, and peak memory on a logarithmic axis where it was measured."""
    bars, heads = _placed(rows)
    height = -min(each.y for each in bars) + 1
    figure = canvas(10.4, height * _INCHES + 0.8)
    with_memory = any(each.contender.peak_bytes for each in bars)
    panels = figure.subplots(
        1, 2 if with_memory else 1, sharey=True, squeeze=False, width_ratios=[7, 4][: 1 + with_memory]
    )[0]
    _draw_times(panels[0], bars, theme)
    if with_memory:
        panels[0].set(zorder=1, facecolor="none")  # its heads reach over into the panel beside it
        _draw_memory(panels[1], bars, theme)
    panels[0].set_yticks([each.y for each in bars], [each.contender.name for each in bars])
    for label, each in zip(panels[0].get_yticklabels(), bars):
        if each.contender.name == each.row.subject:
            label.set_fontweight("bold")
    for row, y in heads:
        _draw_head(panels[0], row, y, theme)
    panels[0].set_ylim(-height, 0.9)
    role_legend(figure, rows, theme, floor=True)
    return figure


def _draw_head(axes: Axes, row: Row, y: float, theme: Theme) -> None:
    """The case and its sizes, on a line of their own that may be longer than the panel."""
    style: dict[str, Any] = {
        "va": "center",
        "annotation_clip": False,
        "bbox": {"facecolor": theme.background, "linewidth": 0, "pad": 1.5},
    }
    case = axes.annotate(
        row.case, (0, y), xycoords=axes.get_yaxis_transform(), fontweight="bold", fontsize=9.5, **style
    )
    sizes = axes.annotate(
        row.sizes_text, (1, 0.5), xycoords=case, xytext=(8, 0), textcoords="offset points", fontsize=8.5,
        color=theme.muted, **style,
    )  # fmt: skip
    for text in (case, sizes):
        text.set_in_layout(False)


def _placed(rows: Sequence[Row]) -> tuple[list[_Bar], list[tuple[Row, float]]]:
    bars: list[_Bar] = []
    heads: list[tuple[Row, float]] = []
    y = 0.0
    for row in rows:
        heads.append((row, y))
        y -= 1.05
        ordered = sorted(
            row.contenders.values(), key=lambda each: (each.name != row.subject, not each.ours, each.median)
        )
        for each in ordered:
            bars.append(_Bar(row, each, y))
            y -= 1
        y -= 0.55
    return bars, heads


def _draw_times(axes: Axes, bars: Sequence[_Bar], theme: Theme) -> None:
    bare(axes, "x")
    longest = min(_LONGEST, max(each.row.ratio(each.contender.name) for each in bars))
    for each in bars:
        ratio = each.row.ratio(each.contender.name)
        axes.barh(
            each.y,
            min(ratio, longest),
            height=0.78,
            color=role_color(each.contender, each.row, theme),
            alpha=0.5 if each.noisy else 1,
            hatch="////" if each.noisy else None,
            edgecolor=theme.background,
            linewidth=0,
        )
        if each.contender.name == each.row.subject:
            share = each.row.floor_seconds / each.row.ours.median
            axes.plot(
                [share, share], [each.y - 0.46, each.y + 0.46], color=theme.ink, linewidth=2, solid_capstyle="butt"
            )
        axes.annotate(
            _label(each, ratio, longest),
            (min(ratio, longest), each.y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=theme.ink,
            bbox={"facecolor": theme.background, "linewidth": 0, "pad": 0.6},
        )
    axes.set_xlim(0, longest * 1.42)
    axes.set_xticks([tick for tick in range(0, 13, 1 if longest <= 6 else 2) if tick <= longest])
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_title("Time, over that of pairtile")


def _label(bar: _Bar, ratio: float, longest: float) -> str:
    text = duration(bar.contender.median)
    if bar.contender.name == bar.row.subject:
        return f"{text}   {bar.row.floor_seconds / bar.contender.median:.0%} of the floor"
    cut = "→ " if ratio > longest else ""
    noise = f"   noisy, ± {percent(bar.row.uncertainty(bar.contender.name))}" if bar.noisy else ""
    if len(bar.contender.seconds) < 2 or len(bar.row.ours.seconds) < 2:
        noise = "   one round"
    return f"{cut}{times(ratio)}   {text}{noise}"


def _draw_memory(axes: Axes, bars: Sequence[_Bar], theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    bare(axes, "x")
    measured = [each for each in bars if each.contender.peak_bytes]
    least, most = (choose(each.contender.peak_bytes or 0 for each in measured) for choose in (min, max))
    for each in measured:
        peak, color = each.contender.peak_bytes or 0, role_color(each.contender, each.row, theme)
        axes.plot([least / 2, peak], [each.y, each.y], color=color, linewidth=1.2, alpha=0.5)
        axes.plot(peak, each.y, marker="o", markersize=6, color=color)
        axes.annotate(size(peak), (peak, each.y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xscale("log")
    axes.set_xlim(least / 2, most * (most / least) ** 0.4 * 1.5)
    axes.xaxis.set_major_locator(LogLocator(numticks=4))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: round_size(value)))
    axes.set_title("Peak memory above the inputs")
