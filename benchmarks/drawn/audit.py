"""The static audit of GPU kernels, as ``python -m benchmarks.audit --json FILE`` writes it, and its figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .results import ReportError
from .tables import Table
from .theme import Theme, bare, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_FIELDS = ("gpu", "request", "phase", "library", "kernel", "share4", "serial")


@dataclass(frozen=True)
class Bound:
    """What the instructions of one phase allow, as shares of the tensor cores' peak.

    Attributes:
        gpu: e.g. "H100".
        request: what is asked, e.g. "CLIP bf16 D=512".
        phase: "forward", "backward" or "both".
        library, kernel: whose launches.
        share4: everything overlaps.
        serial: nothing does.
    """

    gpu: str
    request: str
    phase: str
    library: str
    kernel: str
    share4: float
    serial: float

    @property
    def ours(self) -> bool:
        return self.library == "pairtile"


@dataclass(frozen=True)
class Audit:
    """All bounds of one export.

    Attributes:
        date, triton: of the export.
    """

    bounds: Sequence[Bound]
    date: str
    triton: str
    file: str


def read_audit(file: Path) -> Audit:
    """
    Raises:
        ReportError: no such file, or not an export of the audit.
    """
    try:
        stored = json.loads(file.read_text())
        bounds = [Bound(**{name: each[name] for name in _FIELDS}) for each in stored["bounds"]]
        return Audit(bounds, stored["date"], stored["triton"], file.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{file}: not an export of the audit ({type(error).__name__}: {error}); "
            "expected what `python -m benchmarks.audit --json FILE` writes"
        ) from None


def table(audit: Audit) -> Table:
    titles = ("request", "GPU", "phase", "library", "all overlaps", "nothing overlaps")
    lines = [
        (
            each.request,
            each.gpu,
            each.phase,
            f"{each.library} {each.kernel}",
            f"{each.share4:.0%}",
            f"{each.serial:.0%}",
        )
        for each in audit.bounds
    ]
    return Table(titles, tuple(lines))


def draw_audit(audit: Audit, theme: Theme) -> Canvas:
    """For each request and phase a span from "nothing overlaps" to "everything overlaps" for each library.

    Of requests that no other library has the figures are in the table alone, unless there are no others.
    """
    compared = {(each.gpu, each.request) for each in audit.bounds if not each.ours}
    bounds = [each for each in audit.bounds if not compared or (each.gpu, each.request) in compared]
    groups = list(dict.fromkeys((each.gpu, each.request, each.phase) for each in bounds))
    height = len(bounds) + 1.6 * len(groups)
    figure = canvas(10.4, 0.22 * height + 0.8)
    axes = figure.subplots()
    bare(axes, "x")
    ticks, names, y = [], [], 0.0
    for group in groups:
        gpu, request, phase = group
        axes.text(0, y, f"{request}, {phase}, {gpu}", fontweight="bold", fontsize=9.5, va="center",
                  bbox={"facecolor": theme.background, "linewidth": 0, "pad": 1.5})  # fmt: skip
        for each in (each for each in bounds if (each.gpu, each.request, each.phase) == group):
            y -= 1
            color = theme.ours if each.ours else theme.others[0]
            axes.barh(y, each.share4 - each.serial, left=each.serial, height=0.55, color=color)
            axes.annotate(
                f"{each.serial:.0%} to {each.share4:.0%}", (each.share4, y), xytext=(5, 0), textcoords="offset points",
                va="center", fontsize=8.5, bbox={"facecolor": theme.background, "linewidth": 0, "pad": 0.6},
            )  # fmt: skip
            ticks.append(y)
            names.append(f"{each.library} {each.kernel}".strip())
        y -= 1.6
    axes.set_yticks(ticks, names)
    for label, name in zip(axes.get_yticklabels(), names):
        label.set_fontweight("bold" if name.startswith("pairtile") else "normal")
    axes.set_ylim(y + 0.8, 0.9)
    axes.set_xlim(0, 1.18)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title("Share of the tensor cores' peak that the instructions allow: from no overlap to full overlap")
    return figure
