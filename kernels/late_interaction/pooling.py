"""How the similarities of one token with all tokens of the other side become one number."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MaxPooling:
    """The largest similarity: ColBERT (arXiv:2004.12832), FILIP (arXiv:2111.07783). Among equals the first token."""


@dataclass(frozen=True)
class TopMeanPooling:
    """The mean of the k largest similarities; of all where there are fewer.

    Attributes:
        k: at least 1; 1 is `MaxPooling`.
    """

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"TopMeanPooling(k={self.k!r}): expected a whole number of at least 1")


@dataclass(frozen=True)
class SoftmaxPooling:
    """sum_q softmax_q(s_q / temperature) s_q: the soft maximum of CiCo (arXiv:2303.12793).

    Attributes:
        temperature: above 0; the paper's code has 0.07.
    """

    temperature: float

    def __post_init__(self) -> None:
        _check_temperature(self)


@dataclass(frozen=True)
class LogSumExpPooling:
    """temperature * log sum_q exp(s_q / temperature): the soft maximum of Norton (arXiv:2401.16702).

    Attributes:
        temperature: above 0; the paper's alpha is its reciprocal.
    """

    temperature: float

    def __post_init__(self) -> None:
        _check_temperature(self)


@dataclass(frozen=True)
class AttentionPooling:
    """cos(t, v) with v = sum_q softmax_q(<t, y_q> / temperature) y_q: token t pools the other side, and is compared with it.

    The similarity of RadZero (arXiv:2504.07416; a sentence pools patches) and of GLSCL's global branch
    (arXiv:2405.12710; a text pools frames). A pooled vector shorter than 1e-8 counts as that long.

    Attributes:
        temperature: above 0.
    """

    temperature: float

    def __post_init__(self) -> None:
        _check_temperature(self)


Pooling = MaxPooling | TopMeanPooling | SoftmaxPooling | LogSumExpPooling | AttentionPooling


def _check_temperature(pooling: SoftmaxPooling | LogSumExpPooling | AttentionPooling) -> None:
    given = pooling.temperature
    if not isinstance(given, (int, float)) or not 0 < given < math.inf:
        raise ValueError(f"{type(pooling).__name__}(temperature={given!r}): expected a finite number above 0")


def check_pooling(pooling: object) -> None:
    """Raise unless it is one of those above."""
    if not isinstance(pooling, Pooling):
        raise TypeError(
            f"pooling={pooling!r}: expected MaxPooling(), TopMeanPooling(k), SoftmaxPooling(temperature), "
            "LogSumExpPooling(temperature) or AttentionPooling(temperature)"
        )
