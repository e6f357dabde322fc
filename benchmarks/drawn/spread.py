"""How far a ratio of two medians can be trusted, judged by the spread of the rounds behind it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

#: Two runs of one benchmark are asked to give ratios within this of each other, nine times out of ten.
REPEATABLE = 0.10

#: Of a normal distribution, in standard deviations: nine of ten samples stay within it.
NINE_OF_TEN = 1.645
#: The interquartile range, and the standard error of a median over that of a mean.
_QUARTILES, _MEDIAN = 1.349, 1.2533


def quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of a single value that value twice."""
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


def relative_deviation(seconds: Sequence[float]) -> float:
    """Standard error of the median over the median, from the interquartile range; infinite for fewer than 2 rounds."""
    if len(seconds) < 2:
        return math.inf
    low, high = quartiles(seconds)
    return _MEDIAN / _QUARTILES * (high - low) / statistics.median(seconds) / math.sqrt(len(seconds))


def ratio_uncertainty(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How far the ratio of the medians of a second run with the same spread may lie from this one's, relative to it.

    Nine of ten second runs stay within it. Both runs have the errors of two medians, which are independent.
    The quartiles are used because single rounds that the machine disturbed say nothing about the median.
    """
    return NINE_OF_TEN * math.sqrt(2) * math.hypot(relative_deviation(ours), relative_deviation(theirs))


def is_noisy(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """A second run's ratio would differ by more than `REPEATABLE` more often than one time in ten."""
    return ratio_uncertainty(ours, theirs) > REPEATABLE
