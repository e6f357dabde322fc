"""What a row is held to: a measured figure, and the limit it must reach or stay under."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .harness import Result


class NotMeasured(Exception):
    """A bar whose contender did not take part; the text says why."""


@dataclass(frozen=True)
class Judgement:
    """A bar and what became of it; `met` is None where it could not be judged."""

    bar: str
    beside: str | None
    measured: float | None
    met: bool | None
    text: str


@dataclass(frozen=True)
class Bar:
    """One requirement on our own first contender.

    Attributes:
        text: as printed, e.g. ">= 3x open_clip".
        measure: gives the figure; may raise `NotMeasured`.
        limit: what the figure is compared with.
        at_least: the figure must reach the limit; otherwise it must stay below it.
        beside: the contender in whose line the bar is printed; None for our own.
        shown: how the figure is printed.
    """

    text: str
    measure: Callable[[Result], float]
    limit: float
    at_least: bool
    beside: str | None = None
    shown: str = "{:.2f}"

    def judge(self, result: Result) -> Judgement:
        try:
            measured = self.measure(result)
        except NotMeasured as reason:
            return Judgement(self.text, self.beside, None, None, f"{self.text}: not judged ({reason})")
        met = measured >= self.limit if self.at_least else measured <= self.limit
        verdict = "met" if met else "MISSED"
        text = f"{self.text}: {verdict}, {self.shown.format(measured)}"
        return Judgement(self.text, self.beside, measured, met, text)


def faster_than(name: str, times: float, ours: str | None = None) -> Bar:
    """The median of our first contender, or of another one of ours, is at most 1/times of the other's."""
    return Bar(
        text=f">= {times:g}x {name}" + (f" ({ours})" if ours else ""),
        measure=lambda result: result.median(name) / result.median(ours),
        limit=times,
        at_least=True,
        beside=name,
    )


def faster_than_best(names: Sequence[str], times: float) -> Bar:
    """Our median is at most 1/times of the fastest of the others."""
    return Bar(
        text=f">= {times:g}x the best other",
        measure=lambda result: min(result.median(name) for name in names) / result.median(),
        limit=times,
        at_least=True,
    )


def leaner_than(name: str, share: float, ours: str | None = None) -> Bar:
    """The peak memory of our first contender, or of another one of ours, is at most this share of the other's."""
    return Bar(
        text=f"<= 1/{1 / share:g} of {name}'s memory" + (f" ({ours})" if ours else ""),
        measure=lambda result: result.peak(ours) / result.peak(name),
        limit=share,
        at_least=False,
        beside=name,
        shown="{:.3f}",
    )


def leaner_beyond_gradients(name: str, share: float) -> Bar:
    """Our peak memory without what the gradients take is at most this share of the other's, without them as well."""

    def measure(result: Result) -> float:
        ours, theirs = (each - result.gradient_bytes for each in (result.peak(), result.peak(name)))
        return ours / theirs

    return Bar(f"<= 1/{1 / share:g} of {name}'s memory beyond gradients", measure, share, False, name, "{:.3f}")


def peak_below(limit: int) -> Bar:
    """Our peak memory above the inputs, in bytes."""
    return Bar(
        text=f"peak < {limit / 2**20:.0f} MiB",
        measure=lambda result: result.peak() / 2**20,
        limit=limit / 2**20,
        at_least=False,
        shown="{:.0f} MiB",
    )


def share_of_floor(share: float) -> Bar:
    """The floor divided by our median."""
    return Bar(
        text=f">= {share:.0%} of the floor",
        measure=lambda result: result.share(),
        limit=share,
        at_least=True,
        shown="{:.0%}",
    )
