"""How plots look: one palette that people with any colour vision can tell apart, on white and on dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .results import Contender, ReportError, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


@dataclass(frozen=True)
class Theme:
    """Colours of everything but the data; `background` is the page's own.

    Attributes:
        ours: of our first contender; `of_ours` of our others.
        others: of the rest, in the order in which they appear. With ours they are the palette of Okabe and Ito, made
            lighter on a dark page.
    """

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    ours: str
    of_ours: Sequence[str]
    others: Sequence[str]


LIGHT = Theme(
    "light", "#ffffff", "#1f2328", "#656d76", "#e4e7eb", "#0072b2", ("#56b4e9", "#7f9fc9"),
    ("#d55e00", "#009e73", "#cc79a7", "#b8860b", "#6b4c9a", "#5a5a5a", "#8c564b"),
)  # fmt: skip
DARK = Theme(
    "dark", "#0d1117", "#e6edf3", "#9198a1", "#2a3038", "#4aa8e8", ("#9fd3f7", "#7f9fc9"),
    ("#f0883e", "#2fc795", "#e29bc4", "#e3c15a", "#a98bd9", "#b0b0b0", "#c08a7d"),
)  # fmt: skip
MARKERS = ("s", "D", "^", "v", "P", "X", "p")


@dataclass(frozen=True)
class Look:
    """Of one contender, the same in all panels of a figure; markers differ too, for print in grey."""

    color: str
    marker: str
    dashed: bool


def looks(contenders: Sequence[Contender], subjects: set[str], theme: Theme) -> Mapping[str, Look]:
    """By name, in the order given: blue is ours; who is compiled is dashed."""
    found: dict[str, Look] = {}
    mine = others = 0
    for each in contenders:
        if each.name in found:
            continue
        if each.name in subjects:
            found[each.name] = Look(theme.ours, "o", False)
        elif each.ours:
            found[each.name] = Look(theme.of_ours[mine % len(theme.of_ours)], "o", False)
            mine += 1
        else:
            color, marker = theme.others[others % len(theme.others)], MARKERS[others % len(MARKERS)]
            found[each.name] = Look(color, marker, each.compiled)
            others += 1
    return found


#: Contenders as bars and dots name them directly: what colours tell is only who is who.
ROLES = ("pairtile", "pairtile, other settings", "others", "others, torch.compile")


def role_of(contender: Contender, row: Row) -> int:
    """An index of `ROLES`."""
    if contender.ours:
        return int(contender.name != row.subject)
    return 3 if contender.compiled else 2


def role_color(contender: Contender, row: Row, theme: Theme) -> str:
    return (theme.ours, theme.of_ours[0], *theme.others)[role_of(contender, row)]


def role_legend(figure: Canvas, rows: Sequence[Row], theme: Theme, *, floor: bool = False) -> None:
    """Above the panels: the roles that these rows have."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colors = (theme.ours, theme.of_ours[0], *theme.others)
    there = sorted({role_of(each, row) for row in rows for each in row.contenders.values()})
    handles: list[Any] = [Patch(color=colors[role], label=ROLES[role]) for role in there]
    if floor:
        handles.append(
            Line2D([], [], color=theme.ink, marker="|", markersize=10, markeredgewidth=2, linewidth=0, label="floor")
        )
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=1.2)


def drawn(draw: Callable[[Theme], Canvas], theme: Theme) -> bytes:
    """The PNG that `draw` gives, at twice the size of the screen.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ReportError("plots need matplotlib, which is not installed: pip install 'pairtile[report]'") from None
    with matplotlib.rc_context(_settings(theme)):
        made, buffer = draw(theme), io.BytesIO()
        made.savefig(buffer, format="png", dpi=160, bbox_inches="tight", pad_inches=0.12)
    return buffer.getvalue()


def canvas(width: float, height: float) -> Canvas:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")


def bare(axes: Axes, grid: str = "both") -> None:
    """Grid lines behind the data, no frame, no ticks."""
    axes.grid(visible=False, which="both")
    axes.grid(visible=True, which="major", axis=grid)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)


def _settings(theme: Theme) -> Any:
    return {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.spines.bottom": False,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.ink,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.labelcolor": theme.ink,
        "font.family": "DejaVu Sans",
        "hatch.linewidth": 0.8,
    }
