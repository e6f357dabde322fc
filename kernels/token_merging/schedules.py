"""How many tokens each layer merges: schedules, token counts and FLOPs.

A schedule is a function (layers, tokens, protected) -> r for each layer, from the number of tokens that enter the first
layer and how many of them are never merged. A layer that n tokens enter can merge at most half of the others,
(n - protected) // 2.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

Schedule: TypeAlias = Callable[[int, int, int], list[int]]


@dataclass(frozen=True)
class ConstantR:
    """The same r in every layer (ToMe, arXiv:2210.09461)."""

    r: int

    def __post_init__(self) -> None:
        _check_at_least("r", self.r, 0)

    def __call__(self, layers: int, tokens: int, protected: int = 0) -> list[int]:
        return _applied([self.r] * layers, tokens, protected)


@dataclass(frozen=True)
class LinearR:
    """r that falls or rises by layer around a mean (ToMe's inflection; its appendix's decreasing schedule is -1).

    Attributes:
        r: the mean over the layers.
        inflection: from -1 (2 r in the first layer, 0 in the last) over 0 (constant) to 1 (the reverse).
    """

    r: int
    inflection: float = -1.0

    def __post_init__(self) -> None:
        _check_at_least("r", self.r, 0)
        if not -1 <= self.inflection <= 1:
            raise ValueError(f"inflection={self.inflection!r}: expected a number from -1 (falling) to 1 (rising)")

    def __call__(self, layers: int, tokens: int, protected: int = 0) -> list[int]:
        first = int(self.r * (1 - self.inflection))
        step = (2 * (self.r - first)) / max(1, layers - 1)
        return _applied([int(first + step * layer) for layer in range(layers)], tokens, protected)


@dataclass(frozen=True)
class KeepRatio:
    """A share of the tokens that enter a layer, the protected ones aside, leaves it.

    Attributes:
        ratio: at least 0.5 and at most 1, for all layers, or one for each.
    """

    ratio: float | Sequence[float]

    def __post_init__(self) -> None:
        if not all(0.5 <= each <= 1 for each in self._each(1)):
            raise ValueError(f"ratio={self.ratio!r}: expected shares from 0.5 to 1, as one layer merges at most half")

    def _each(self, layers: int) -> Sequence[float]:
        return (self.ratio,) * layers if isinstance(self.ratio, (int, float)) else self.ratio

    def __call__(self, layers: int, tokens: int, protected: int = 0) -> list[int]:
        ratios = self._each(layers)
        if len(ratios) != layers:
            raise ValueError(f"{len(ratios)} ratios for {layers} layers: expected one for each, or a single number")
        found = []
        for ratio in ratios:
            r = min(round((1 - ratio) * (tokens - protected)), merge_limit(tokens, protected))
            found.append(r)
            tokens -= r
        return found


@dataclass(frozen=True)
class TargetTokens:
    """So many tokens leave the last layer, the protected ones among them; the layers merge as evenly as they can.

    Attributes:
        tokens: a number, or a share of those that enter, from 0 to 1 (AuroraCap's visual token kept ratio).
    """

    tokens: int | float

    def __post_init__(self) -> None:
        if isinstance(self.tokens, float) and not 0 < self.tokens <= 1:
            raise ValueError(f"tokens={self.tokens!r}: expected a whole number, or a share from 0 to 1")
        if isinstance(self.tokens, int):
            _check_at_least("tokens", self.tokens, 1)

    def __call__(self, layers: int, tokens: int, protected: int = 0) -> list[int]:
        target = self.tokens if isinstance(self.tokens, int) else max(1, round(self.tokens * tokens))
        return _least_spread(layers, tokens, protected, lambda counts: counts[-1] <= target, f"{target} tokens")


@dataclass(frozen=True)
class FlopsBudget:
    """The fewest merges, spread evenly over the layers, that bring `transformer_flops` to a share of its value without.

    Attributes:
        share: of the FLOPs without merging, from 0 to 1.
        width: channels of a token.
        mlp_ratio: hidden channels of the MLP over `width`.
    """

    share: float
    width: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share!r}: expected a number above 0 and at most 1")
        _check_at_least("width", self.width, 1)

    def __call__(self, layers: int, tokens: int, protected: int = 0) -> list[int]:
        budget = self.share * transformer_flops([tokens] * (layers + 1), self.width, self.mlp_ratio)
        return _least_spread(
            layers,
            tokens,
            protected,
            lambda counts: transformer_flops(counts, self.width, self.mlp_ratio) <= budget,
            f"{self.share:.1%} of the FLOPs",
        )


def schedule_of(r: int | tuple[int, float] | Sequence[int] | Schedule) -> Schedule:
    """ToMe's ways to say r: a number, a pair (r, inflection), a list for the first layers (others: 0); or a schedule.

    Raises:
        TypeError: anything else.
    """
    if callable(r):
        return r
    if isinstance(r, int):
        return ConstantR(r)
    if isinstance(r, tuple) and len(r) == 2:
        return LinearR(int(r[0]), r[1])
    if isinstance(r, Sequence) and not isinstance(r, str) and all(isinstance(each, int) for each in r):
        return ListedR(tuple(int(each) for each in r))
    raise TypeError(
        f"r={r!r}: expected a whole number, a pair (r, inflection), a list of numbers, or a schedule such as KeepRatio"
    )


@dataclass(frozen=True)
class ListedR:
    """A number for each layer; layers without one merge nothing."""

    r: tuple[int, ...]

    def __post_init__(self) -> None:
        for each in self.r:
            _check_at_least("r", each, 0)

    def __call__(self, layers: int, tokens: int, protected: int = 0) -> list[int]:
        if len(self.r) > layers:
            raise ValueError(f"{len(self.r)} values of r for {layers} layers: expected at most one for each")
        return _applied([*self.r, *[0] * (layers - len(self.r))], tokens, protected)


def merge_limit(tokens: int, protected: int = 0) -> int:
    """The most that one layer can merge of so many tokens."""
    return max(0, (tokens - protected) // 2)


def tokens_per_layer(r: Sequence[int], tokens: int, protected: int = 0) -> list[int]:
    """How many tokens enter each layer and, last, leave the model: one more number than layers."""
    counts = [tokens]
    for each in r:
        counts.append(counts[-1] - min(each, merge_limit(counts[-1], protected)))
    return counts


def transformer_flops(counts: Sequence[int], width: int, mlp_ratio: float = 4.0) -> float:
    """FLOPs of the matrix products of a transformer that merges between attention and MLP, of one sample, forward.

    A layer that n tokens enter and m leave takes 8 n C^2 (query, key, value and output projections) + 4 n^2 C (scores
    and their weighted sum) + 4 mlp_ratio m C^2 (the MLP's two products). A multiplication with its addition counts as
    2. Norms, activations, softmax, embeddings, heads and the matching are left out.

    Args:
        counts: of `tokens_per_layer`.
        width: C, channels of a token.
        mlp_ratio: hidden channels of the MLP over C; 1.5 times as much for a gated one.
    """
    return sum(8 * n * width**2 + 4 * n**2 * width + 4 * mlp_ratio * m * width**2 for n, m in pairwise(counts))


def _applied(r: Sequence[int], tokens: int, protected: int) -> list[int]:
    """What each layer merges, where it is asked for more than it can."""
    counts = tokens_per_layer(r, tokens, protected)
    return [before - after for before, after in pairwise(counts)]


def _least_spread(
    layers: int, tokens: int, protected: int, enough: Callable[[list[int]], bool], wanted: str
) -> list[int]:
    """The even spread of the fewest merges that is enough; each further one falls to the first layer with least."""

    def spread(total: int) -> list[int]:
        return [total // layers + (layer < total % layers) for layer in range(layers)]

    most = layers * tokens
    total = bisect_left(
        range(most + 1), True, key=lambda total: enough(tokens_per_layer(spread(total), tokens, protected))
    )
    if total > most:
        least = tokens_per_layer(spread(most), tokens, protected)
        raise ValueError(
            f"{layers} layers cannot get from {tokens} tokens to {wanted}: each merges at most half of those not "
            f"protected, which leaves {least[-1]}"
        )
    return _applied(spread(total), tokens, protected)


def _check_at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")
