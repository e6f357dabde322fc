"""The reductions that a caller asked for: checked, and resolved into what every backend understands."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .arguments import check_indices, check_targets, vector
from .compiled import traced_pair_scores
from .operands import Operands, pair_scores
from .reductions import (
    Above,
    AbovePositive,
    ColumnRange,
    Diagonal,
    DifferentId,
    LogSumExp,
    PairRule,
    PairRules,
    PairScore,
    Reduction,
    SameId,
    SoftplusSum,
    Target,
    rules_of,
)

_AXES = ("column of y", "row of x")


def _is_plain(given: PairRules | None) -> bool:
    return given is None or isinstance(given, Diagonal)


class Request:
    """Resolves reductions of one similarity matrix."""

    def __init__(self, operands: Operands, budget: int) -> None:
        self._operands, self._budget = operands, budget
        self._dtype, self._device = operands.scale.dtype, operands.x.device

    def reductions(self, given: Iterable[Reduction], name: str, dim: int) -> tuple[Reduction, ...]:
        """Those of one direction, dim 1 for `rows`, 0 for `cols`.

        Raises:
            TypeError: a reduction or a rule of an unknown kind; a reduction that is in no list.
            ValueError: tensors of a wrong length, dtype or device; a target that is no column.
        """
        if isinstance(given, (LogSumExp, SoftplusSum, PairScore)):
            raise TypeError(f"{name} is one {type(given).__name__}: expected a list of them, {name}=[...]")
        return tuple([self._reduction(each, name, dim) for each in given])

    def _reduction(self, reduction: Reduction, name: str, dim: int) -> Reduction:
        # What needs no change is handed on as it is: the usual losses, where every microsecond of a small batch counts.
        if isinstance(reduction, PairScore):
            self._check_own_pair(reduction.pair, reduction, dim)
            return reduction
        if not isinstance(reduction, (LogSumExp, SoftplusSum)):
            raise TypeError(f"{name} holds {reduction!r}: expected LogSumExp(...), SoftplusSum(...) or PairScore(...)")
        positive = reduction.positive if isinstance(reduction, SoftplusSum) else None
        if reduction.weights is None and _is_plain(reduction.exclude) and _is_plain(positive):
            return reduction
        exclude, weights = self._rules(reduction.exclude, dim), self._weights(reduction.weights, dim)
        if isinstance(reduction, LogSumExp):
            return LogSumExp(exclude, weights)
        return SoftplusSum(self._rules(positive, dim), exclude, weights)

    def _weights(self, weights: Tensor | None, dim: int) -> Tensor | None:
        if weights is None:
            return None
        name = "weights of a reduction of " + ("rows" if dim == 1 else "cols")
        weights = vector(weights, name, self._operands.length(1 - dim), _AXES[1 - dim], self._dtype, self._device)
        return weights.detach() if weights.requires_grad else weights

    def _rules(self, given: PairRules | None, dim: int) -> PairRules | None:
        return None if given is None else tuple([self._rule(rule, dim) for rule in rules_of(given)])

    def _rule(self, rule: PairRule, dim: int) -> PairRule:
        if isinstance(rule, (Diagonal, ColumnRange)):
            return rule
        if isinstance(rule, Target):
            check_targets(rule.columns, self._operands.length(1), self._operands.length(0), self._device)
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

    def _check_own_pair(self, pair: Diagonal | Target, user: PairScore | AbovePositive, dim: int) -> None:
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
        check_targets(pair.columns, self._operands.length(1), self._operands.length(0), self._device)

    def _resolved(self, rule: AbovePositive, dim: int) -> Above:
        """The threshold of each owner, from scores in float64, rounded once."""
        self._check_own_pair(rule.pair, rule, dim)
        scores = traced_pair_scores if torch.compiler.is_compiling() else pair_scores
        own = scores(self._operands.detached(), rule.pair, dim, self._budget, math.inf)
        return Above((own + rule.margin).to(self._dtype), rule.pair)
