"""Clocks of a whole forward or backward: every launch of it, the estimate for one program times its grid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .examine import Examined, runs_at
from .requests import Request

#: Useful FLOPs for each pair of S and each feature.
FLOPS = {"forward": 2, "backward": 6, "both": 6}


@dataclass(frozen=True)
class Total:
    """One phase of a request.

    Attributes:
        small_scores: which of two guarded launches works (`examine.runs_at`).
        share4, serial: clocks of the useful FLOPs at the dense peak, over those of all launches together.
        parts: of the serial clocks, by kernel.
    """

    phase: str
    small_scores: bool
    share4: float
    serial: float
    parts: dict[str, float]


def totals(examined: Sequence[Examined], request: Request) -> list[Total]:
    """Each phase where scores are small and, if other launches serve them, where they are not.

    The launch that returns at once is left out: it costs a load and a branch for each of its programs.
    """
    found = []
    for phase in dict.fromkeys(each.launch.phase for each in examined):
        small, large = (_total(examined, request, phase, small) for small in (True, False))
        found += [small, large] if large.parts != small.parts else [small]
    return found


def _total(examined: Sequence[Examined], request: Request, phase: str, small_scores: bool) -> Total:
    overlapped = rate = 0.0
    parts: dict[str, float] = defaultdict(float)
    for each in examined:
        if each.usual is None:
            continue
        if each.work.flops:
            rate = each.work.flops / each.usual.clocks["useful"]
        if each.launch.phase == phase and runs_at(each.launch, small_scores):
            overlapped += each.usual.clocks["least4"] * each.launch.programs
            parts[each.launch.name] += each.usual.clocks["sum"] * each.launch.programs
    x, y = request.operands.x, request.operands.y
    peak = FLOPS[phase] * len(x) * len(y) * x.shape[1] / rate
    serial = sum(parts.values())
    return Total(
        phase, small_scores, peak / overlapped, peak / serial, {name: part / serial for name, part in parts.items()}
    )
