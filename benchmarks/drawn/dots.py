"""Errors against float64, a line for each row: the value's on the left, the worst gradient's on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .results import Contender, Row
from .theme import Theme, bare, canvas, role_color, role_legend, role_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_MARKERS = ("o", "o", "D", "s")
#: By role, so that equal errors lie above each other.
_OFFSETS = (0.0, 0.2, -0.2, -0.3)
#: An error of exactly 0 is drawn here: below what float64 itself can tell apart.
_ZERO = 1e-17


def with_errors(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if any(each.value_error is not None for each in row.contenders.values())]


def draw_errors(rows: Sequence[Row], theme: Theme) -> Canvas:
    """Every contender of each row; rows without errors are left out by `with_errors`."""
    figure = canvas(10.4, 0.36 * len(rows) + 1.3)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, rows, [[each.value_error for each in row.contenders.values()] for row in rows], theme)
    _draw(right, rows, [[each.gradient_error for each in row.contenders.values()] for row in rows], theme)
    left.set_title("Error of the value")
    right.set_title("Error of the worst gradient")
    left.set_yticks(range(0, -len(rows), -1), [f"{row.case}\n{row.error_sizes_text}" for row in rows], fontsize=7.5)
    left.set_ylim(-len(rows) + 0.4, 0.6)
    role_legend(figure, rows, theme)
    return figure


def _draw(axes: Axes, rows: Sequence[Row], errors: Sequence[Sequence[float | None]], theme: Theme) -> None:
    bare(axes)
    axes.set_xscale("log")
    for place, (row, of_row) in enumerate(zip(rows, errors)):
        for contender, error in _ours_last(row, of_row):
            role = role_of(contender, row)
            axes.plot(
                max(error, _ZERO),
                -place + _OFFSETS[role],
                marker=_MARKERS[role],
                markersize=7.5 if role == 0 else 5.5,
                color=role_color(contender, row, theme),
                markeredgecolor=theme.background,
                markeredgewidth=0.8,
                linestyle="none",
            )
    axes.margins(x=0.08)


def _ours_last(row: Row, errors: Sequence[float | None]) -> list[tuple[Contender, float]]:
    """On top of the others where they coincide."""
    pairs = [(each, error) for each, error in zip(row.contenders.values(), errors) if error is not None]
    return sorted(pairs, key=lambda pair: -role_of(pair[0], row))
