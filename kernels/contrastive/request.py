"""The reductions that a caller asked for: checked, and resolved into what every backend understands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import check_features, check_indices, check_targets, factor, vector
from .compiled import traced_pair_scores
from .operands import Operands, pair_scores
from .plan import result_count
from .reductions import (
    Above,
    AbovePositive,
    ArgMax,
    ArgTopK,
    Chosen,
    ColumnRange,
    Count,
    CountAbove,
    Diagonal,
    DifferentId,
    Hinge,
    HingeSum,
    LogSumExp,
    Max,
    Paced,
    PairRule,
    PairRules,
    PairScore,
    Reduction,
    SameId,
    Served,
    SoftmaxMean,
    SoftplusSum,
    Target,
    Teacher,
    TopK,
    rules_of,
)

_AXES = ("column of y", "row of x")
_KNOWN = (LogSumExp, SoftplusSum, PairScore, SoftmaxMean, HingeSum, CountAbove, TopK, ArgTopK, Max, ArgMax)
_MOST_CHOSEN = 1024


def _is_plain(given: PairRules | None) -> bool:
    return given is None or isinstance(given, Diagonal)


#: Of a pair and a direction, S at each owner's own pair; see `Request`.
OwnScores = Callable[[Diagonal | Target, int, float], Tensor]
#: Makes one result that the caller asked for of those that the backend gave, by their positions.
Maker = Callable[[list[Tensor]], Tensor]


@dataclass
class Resolved:
    """What a backend is to serve, in one direction, and how its results become those that were asked for.

    `makers` is None where they are the same, one for one.
    """

    served: tuple[Served, ...]
    makers: list[Maker] | None = None

    @property
    def results(self) -> int:
        return sum(result_count(each) for each in self.served) if self.makers else len(self.served)

    def assemble(self, results: Iterable[Tensor]) -> tuple[Tensor, ...]:
        found = list(results)
        return tuple(found) if self.makers is None else tuple([make(found) for make in self.makers])


class Request:
    """Resolves reductions of one similarity matrix.

    Args:
        operands: its own; or, with `columns` and `own_scores`, a rank's part of them.
        budget: bytes of working memory.
        columns: of the whole matrix, which a `Target` names.
        own_scores: (pair, dim, missing) -> S at each owner's own pair, float64; `missing` where it has none.
    """

    def __init__(
        self, operands: Operands, budget: int, columns: int | None = None, own_scores: OwnScores | None = None
    ) -> None:
        self._operands, self._budget = operands, budget
        self._columns = operands.length(0) if columns is None else columns
        self._own_scores = own_scores or self._own_scores_here
        self._dtype, self._device = operands.scale.dtype, operands.x.device
        self._teachers: dict[Teacher, Teacher] = {}  # by identity: one for all reductions that name it

    @property
    def teachers(self) -> int:
        """How many the reductions resolved so far name."""
        return len(self._teachers)

    def reductions(self, given: Iterable[Reduction], name: str, dim: int) -> Resolved:
        """Those of one direction, dim 1 for `rows`, 0 for `cols`.

        Raises:
            TypeError: a reduction or a rule of an unknown kind; a reduction that is in no list.
            ValueError: tensors of a wrong length, dtype or device; a target that is no column; a number out of range.
        """
        if isinstance(given, _KNOWN):
            raise TypeError(f"{name} is one {type(given).__name__}: expected a list of them, {name}=[...]")
        listed = tuple(given)
        if all([isinstance(each, (LogSumExp, SoftplusSum, PairScore, SoftmaxMean)) for each in listed]):
            return Resolved(tuple([self._reduction(each, name, dim) for each in listed]))
        return _Expansion(self, name, dim).resolved(listed)

    def _reduction(
        self, reduction: Reduction, name: str, dim: int
    ) -> LogSumExp | SoftplusSum | PairScore | SoftmaxMean:
        # What needs no change is handed on as it is: the usual losses, where every microsecond of a small batch counts.
        if isinstance(reduction, PairScore):
            self.check_own_pair(reduction.pair, reduction, dim)
            return reduction
        if not isinstance(reduction, (LogSumExp, SoftplusSum, SoftmaxMean)):
            raise TypeError(
                f"{name} holds {reduction!r}: expected " + ", ".join(f"{each.__name__}(...)" for each in _KNOWN)
            )
        if isinstance(reduction, SoftplusSum):
            positive = reduction.positive
            if reduction.weights is None and _is_plain(reduction.exclude) and _is_plain(positive):
                return reduction
            return SoftplusSum(
                self.rules(positive, dim), self.rules(reduction.exclude, dim), self.weights(reduction.weights, dim)
            )
        untaught = isinstance(reduction, LogSumExp) and reduction.of is None
        if untaught and reduction.weights is None and _is_plain(reduction.exclude):
            return reduction
        exclude, weights = self.rules(reduction.exclude, dim), self.weights(reduction.weights, dim)
        if isinstance(reduction, LogSumExp):
            of = reduction.of
            return LogSumExp(exclude, weights, of if isinstance(of, Paced) else self.teacher(of, reduction))
        if not isinstance(reduction.sharpness, (int, float)) or not math.isfinite(reduction.sharpness):
            raise ValueError(f"SoftmaxMean.sharpness={reduction.sharpness!r}: expected a finite number")
        of, under = self.teacher(reduction.of, reduction), self.teacher(reduction.under, reduction)
        return SoftmaxMean(of, under, float(reduction.sharpness), exclude, weights)

    def weights(self, weights: Tensor | None, dim: int) -> Tensor | None:
        if weights is None:
            return None
        name = "weights of a reduction of " + ("rows" if dim == 1 else "cols")
        weights = vector(weights, name, self._operands.length(1 - dim), _AXES[1 - dim], self._dtype, self._device)
        return weights.detach() if weights.requires_grad else weights

    def teacher(self, given: object, user: Reduction) -> Teacher | None:
        """The teacher in the features' dtype, without graph, its scale a tensor; the same object for the same teacher."""
        if given is None:
            return None
        if not isinstance(given, Teacher):
            raise TypeError(f"{type(user).__name__} is of {given!r}: expected None for S, or a Teacher(...)")
        if given not in self._teachers:
            check_features(given.x, given.y, "Teacher.x", "Teacher.y")
            for features, name, dim in ((given.x, "x", 1), (given.y, "y", 0)):
                if features.shape[0] != self._operands.length(dim) or features.device != self._device:
                    raise ValueError(
                        f"Teacher.{name} has shape {list(features.shape)} on {features.device}: expected "
                        f"[{self._operands.length(dim)}, any] on {self._device}, one embedding for each {_AXES[dim]}"
                    )
            dtype = self._operands.x.dtype
            scale = factor(given.scale, "Teacher.scale", self._dtype, self._device, rows=given.x.shape[0])
            self._teachers[given] = Teacher(given.x.detach().to(dtype), given.y.detach().to(dtype), scale.detach())
        return self._teachers[given]

    def rules(self, given: PairRules | None, dim: int) -> PairRules | None:
        return None if given is None else tuple([self._rule(rule, dim) for rule in rules_of(given)])

    def _rule(self, rule: PairRule, dim: int) -> PairRule:
        if isinstance(rule, (Diagonal, ColumnRange)):
            return rule
        if isinstance(rule, Target):
            check_targets(rule.columns, self._operands.length(1), self._columns, self._device)
        elif isinstance(rule, (SameId, DifferentId)):
            kind = type(rule).__name__
            for value, part, axis in ((rule.rows, "rows", 1), (rule.cols, "cols", 0)):
                check_indices(value, f"{kind}.{part}", self._operands.length(axis), _AXES[axis], self._device)
        elif isinstance(rule, AbovePositive):
            return self._resolved(rule, dim)
        else:
            raise TypeError(
                f"{rule!r} is no pair rule: expected Diagonal, Target, SameId, DifferentId, ColumnRange or "
                "AbovePositive, or a tuple of them"
            )
        return rule

    def check_own_pair(
        self, pair: Diagonal | Target, user: PairScore | AbovePositive | HingeSum | CountAbove, dim: int
    ) -> None:
        if isinstance(pair, Diagonal):
            return
        kind = type(user).__name__
        if not isinstance(pair, Target):
            raise TypeError(f"{kind}.pair is {pair!r}: expected Diagonal(...) or Target(...)")
        if dim == 0:
            raise ValueError(
                f"{kind}(Target(...)) in a reduction of cols: several rows may name one column, so a column has no "
                "pair of its own; use Diagonal, or swap x and y"
            )
        check_targets(pair.columns, self._operands.length(1), self._columns, self._device)

    def _resolved(self, rule: AbovePositive, dim: int) -> Above:
        return Above(self.thresholds(rule, rule.margin, dim), rule.pair)

    def thresholds(self, user: AbovePositive | HingeSum | CountAbove, margin: float | Tensor, dim: int) -> Tensor:
        """S_own + margin of each owner, from scores in float64, rounded once; +inf for one without a pair."""
        self.check_own_pair(user.pair, user, dim)
        own = self._own_scores(user.pair, dim, math.inf)
        return (own + (margin.detach() if isinstance(margin, Tensor) else margin)).to(self._dtype)

    def _own_scores_here(self, pair: Diagonal | Target, dim: int, missing: float) -> Tensor:
        scores = traced_pair_scores if torch.compiler.is_compiling() else pair_scores
        return scores(self._operands.detached(), pair, dim, self._budget, missing)


class _Expansion:
    """Resolves a list in which some reductions become several, or share one."""

    def __init__(self, request: Request, name: str, dim: int) -> None:
        self._request, self._name, self._dim = request, name, dim
        self._served: list[Served] = []
        self._results = 0
        self._chosen: dict[tuple[object, ...], int] = {}

    def resolved(self, given: tuple[Reduction, ...]) -> Resolved:
        makers = [self._maker(each) for each in given]
        return Resolved(tuple(self._served), makers)

    def _add(self, served: Served) -> int:
        """The position of its first result."""
        self._served.append(served)
        self._results += result_count(served)
        return self._results - result_count(served)

    def _maker(self, reduction: Reduction) -> Maker:
        if isinstance(reduction, (HingeSum, CountAbove)):
            return self._hinge(reduction)
        if isinstance(reduction, (TopK, ArgTopK, Max, ArgMax)):
            at = self._largest(reduction)
            if isinstance(reduction, (Max, ArgMax)):
                return lambda results: results[at].squeeze(1)
            return lambda results: results[at]
        at = self._add(self._request._reduction(reduction, self._name, self._dim))
        return lambda results: results[at]

    def _hinge(self, reduction: HingeSum | CountAbove) -> Maker:
        request, dim, pair = self._request, self._dim, reduction.pair
        margin = -reduction.margin if isinstance(reduction, HingeSum) else reduction.margin
        thresholds = request.thresholds(reduction, margin, dim)
        exclude = request.rules((pair, *rules_of(reduction.exclude)), dim)
        weights = request.weights(reduction.weights, dim)
        count = self._add(Count(thresholds, exclude, weights))
        if isinstance(reduction, CountAbove):
            return lambda results: results[count]
        hinge, own = self._add(Hinge(thresholds, exclude, weights)), self._add(PairScore(pair))

        def make(results: list[Tensor]) -> Tensor:
            # The thresholds had no gradient: each pair that counts takes one from the own pair.
            score = results[own]
            score = score.masked_fill(score.isinf(), 0)
            total: Tensor = results[hinge] - results[count] * (score - score.detach())
            return total

        return make

    def _largest(self, reduction: TopK | ArgTopK | Max | ArgMax) -> int:
        k = reduction.k if isinstance(reduction, (TopK, ArgTopK)) else 1
        if not isinstance(k, int) or not 1 <= k <= _MOST_CHOSEN:
            raise ValueError(f"{type(reduction).__name__}.k={k!r}: expected a whole number from 1 to {_MOST_CHOSEN}")
        key = (k, rules_of(reduction.exclude), reduction.of)
        if key not in self._chosen:
            exclude = self._request.rules(reduction.exclude, self._dim)
            self._chosen[key] = self._add(Chosen(k, exclude, self._request.teacher(reduction.of, reduction)))
        return self._chosen[key] + isinstance(reduction, (ArgTopK, ArgMax))
