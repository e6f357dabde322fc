"""What the torch backend does with one panel of scores, for each reduction: its statistics and its gradient.

A reduction is two classes here: a *state*, which takes in panels and gives the result and what the backward must
know (`dense` if it looks at every pair, else it is filled without the tiles), and a *gradient*, which turns a panel
of scores into d(result . upstream gradient) / dS in place, or, if not dense, adds to it.
Statistics of both directions are running (maximum, sum) pairs, in float32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .operands import Operands, pair_scores
from .reductions import Diagonal, LogSumExp, PairScore, SoftplusSum, rules_of
from .torch_elementwise import exp_, finite, softplus
from .torch_rules import Panel, Selection


class _Pairs:
    """Which pairs a reduction leaves out or counts as positive, and what the others weigh."""

    def __init__(self, reduction: LogSumExp | SoftplusSum, dim: int) -> None:
        self._exclude, self.weights, self._dim = rules_of(reduction.exclude), reduction.weights, dim
        self._positive = rules_of(reduction.positive) if isinstance(reduction, SoftplusSum) else ()
        self._zeros = None if self.weights is None else self.weights == 0

    def excluded(self, panel: Panel) -> Selection | None:
        given = self._exclude or self._zeros is not None
        return Selection(self._exclude, panel, self._dim, self._zeros) if given else None

    def positive(self, panel: Panel) -> Selection | None:
        return Selection(self._positive, panel, self._dim) if self._positive else None

    def sum(self, terms: Tensor, panel: Panel) -> Tensor:
        """The weighted sum of each owner."""
        if self.weights is None:
            return terms.sum(self._dim)
        return (terms if self._dim == 1 else terms.T).mv(panel.along(self.weights, self._dim))

    def weigh_(self, gradient: Tensor, panel: Panel, coefficient: Tensor) -> None:
        """Times the owner's coefficient and the pair's weight."""
        gradient.mul_(coefficient[panel.owners(self._dim)].unsqueeze(self._dim))
        if self.weights is not None:
            gradient.mul_(panel.along(self.weights, self._dim).unsqueeze(1 - self._dim))


class _LogSumExpState:
    """Running maximum and sum of exp(S - maximum), as in the online softmax (arXiv:1805.02867)."""

    dense = True

    def __init__(self, reduction: LogSumExp, dim: int, operands: Operands) -> None:
        self.pairs, self.dim = _Pairs(reduction, dim), dim
        self.maximum = operands.scale.new_full((operands.length(dim),), -torch.inf)
        self.total = torch.zeros_like(self.maximum)

    def update(self, panel: Panel, scratch: Tensor) -> None:
        excluded, scores = self.pairs.excluded(panel), panel.scores
        if excluded is not None:
            scores = scratch.copy_(panel.scores)
            excluded.fill_(scores, -torch.inf)
        owners = panel.owners(self.dim)
        maximum = torch.maximum(self.maximum[owners], scores.amax(self.dim))
        shift = finite(maximum)
        terms = exp_(torch.sub(scores, shift.unsqueeze(self.dim), out=scratch))
        if excluded is not None:
            excluded.fill_(terms, 0)
        total = self.total[owners]
        total.mul_(self.maximum[owners].sub_(shift).exp_()).add_(self.pairs.sum(terms, panel))
        self.maximum[owners] = maximum

    def _sum(self) -> Tensor:
        return self.total.masked_fill(self.maximum == -torch.inf, 0)

    def result(self) -> Tensor:
        return self._sum().log_().add_(finite(self.maximum))

    def statistics(self) -> list[Tensor]:
        # The pair, not the log-sum-exp: rounding the latter would cost a relative 4e-6 in each weight at S = 100.
        return [finite(self.maximum), self._sum()]


class _SoftplusSumState:
    dense = True

    def __init__(self, reduction: SoftplusSum, dim: int, operands: Operands) -> None:
        self.pairs, self.dim = _Pairs(reduction, dim), dim
        self.total = operands.scale.new_zeros(operands.length(dim))

    def update(self, panel: Panel, scratch: Tensor) -> None:
        excluded, positive, scores = self.pairs.excluded(panel), self.pairs.positive(panel), panel.scores
        if positive is not None:
            scores = scores.clone()
            positive.negate_(scores)
        losses = softplus(scores, out=scratch)
        if excluded is not None:
            excluded.fill_(losses, 0)
        self.total[panel.owners(self.dim)].add_(self.pairs.sum(losses, panel))

    def result(self) -> Tensor:
        return self.total

    def statistics(self) -> list[Tensor]:
        return []


class _PairScoreState:
    dense = False

    def __init__(self, reduction: PairScore, dim: int, operands: Operands) -> None:
        self.pair, self.dim, self.operands = reduction.pair, dim, operands

    def fill(self, budget: int) -> None:
        scores = pair_scores(self.operands, self.pair, self.dim, budget)
        self.scores = scores.to(self.operands.scale.dtype)

    def result(self) -> Tensor:
        return self.scores

    def statistics(self) -> list[Tensor]:
        return []


class _LogSumExpGradient:
    """dLSE_i / dS_ij = w_j exp(S_ij - LSE_i), and 0 for an excluded pair."""

    dense = True

    def __init__(self, reduction: LogSumExp, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.pairs, self.dim = _Pairs(reduction, dim), dim
        self.maximum, total = statistics
        self.coefficient = (grad / total).masked_fill_(total == 0, 0)

    def apply_(self, panel: Panel) -> None:
        excluded = self.pairs.excluded(panel)
        exp_(panel.scores.sub_(self.maximum[panel.owners(self.dim)].unsqueeze(self.dim)))
        if excluded is not None:
            excluded.fill_(panel.scores, 0)
        self.pairs.weigh_(panel.scores, panel, self.coefficient)


class _SoftplusSumGradient:
    """d softplus(-z S) / dS = -z sigmoid(-z S)."""

    dense = True

    def __init__(self, reduction: SoftplusSum, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.pairs, self.grad = _Pairs(reduction, dim), grad

    def apply_(self, panel: Panel) -> None:
        excluded, positive = self.pairs.excluded(panel), self.pairs.positive(panel)
        if positive is not None:
            positive.negate_(panel.scores)
        panel.scores.sigmoid_()
        if positive is not None:
            positive.negate_(panel.scores)
        if excluded is not None:
            excluded.fill_(panel.scores, 0)
        self.pairs.weigh_(panel.scores, panel, self.grad)


class _PairScoreGradient:
    dense = False

    def __init__(self, reduction: PairScore, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.pair, self.dim, self.grad = reduction.pair, dim, grad

    def apply_(self, panel: Panel) -> None:
        if isinstance(self.pair, Diagonal):
            offset = self.pair.offset
            start = max(panel.rows.start, panel.cols.start - offset)
            pairs = panel.diagonal(self.pair)
            first = start if self.dim == 1 else start + offset
            pairs.add_(self.grad[first : first + len(pairs)])
        else:
            columns, inside = panel.targets(self.pair)
            panel.scores.scatter_add_(1, columns, self.grad[panel.rows].unsqueeze(1).masked_fill(~inside, 0))


#: Of each reduction: `state(reduction, dim, operands)`, dim 1 for rows, 0 for columns.
STATES: dict[type, Any] = {LogSumExp: _LogSumExpState, SoftplusSum: _SoftplusSumState, PairScore: _PairScoreState}
#: `gradient(reduction, dim, upstream gradient, statistics)`.
GRADIENTS: dict[type, Any] = {
    LogSumExp: _LogSumExpGradient,
    SoftplusSum: _SoftplusSumGradient,
    PairScore: _PairScoreGradient,
}
#: How many statistics each keeps for its backward, here and in the triton backend.
STATISTICS: dict[type, int] = {LogSumExp: 2, SoftplusSum: 0, PairScore: 0}
