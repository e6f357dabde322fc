"""What the torch backend makes of one panel of scores, for each reduction, in the forward.

A reduction is a *state* here, which takes in panels and gives the results and what the backward must know. Statistics of
both directions are running sums and maxima, in float32 or wider. `torch_gradients` has the other half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import Operands, pair_scores
from .reductions import (
    Above,
    Chosen,
    Count,
    Hinge,
    LogSumExp,
    Paced,
    PairScore,
    Served,
    SoftmaxMean,
    SoftplusSum,
    Teacher,
    rules_of,
)
from .torch_elementwise import exp_, finite, pace_slope, paced, softplus
from .torch_largest import largest, merged
from .torch_rules import Panel, Selection

#: How many statistics, [owners] each, a reduction keeps for its backward, here and in the triton backend.
STATISTICS: dict[type, int] = {
    LogSumExp: 2,  # a shift, and the sum of w exp(score - shift)
    SoftplusSum: 0,
    PairScore: 0,
    SoftmaxMean: 3,  # the same of its softmax, and the mean
    Hinge: 0,
    Count: 0,
    Chosen: 0,
}


def similarities(reduction: Served) -> set[Teacher | None]:
    """The similarities that the forward of a reduction looks at: teachers, and None for S."""
    if isinstance(reduction, PairScore):
        return set()
    found: set[Teacher | None] = set(compared(reduction))
    if isinstance(reduction, SoftmaxMean):
        return found | {reduction.of, reduction.under}
    if isinstance(reduction, (LogSumExp, Chosen)):
        return found | {taught(reduction)}
    return found | {None}


def compared(reduction: Served) -> set[None]:
    """S, as the only member, if one of the reduction's rules compares it."""
    if isinstance(reduction, PairScore):
        return set()
    positive = rules_of(reduction.positive) if isinstance(reduction, SoftplusSum) else ()
    return {None for rule in (*positive, *rules_of(reduction.exclude)) if isinstance(rule, Above)}


def taught(reduction: LogSumExp | Chosen) -> Teacher | None:
    """The teacher that it is of, if any."""
    return reduction.of if isinstance(reduction.of, Teacher) else None


class Pairs:
    """Which pairs a reduction leaves out or counts as positive, and what the others weigh."""

    def __init__(self, reduction: LogSumExp | SoftplusSum | SoftmaxMean | Hinge | Count, dim: int) -> None:
        self._exclude, self.weights, self._dim = rules_of(reduction.exclude), reduction.weights, dim
        self._positive = rules_of(reduction.positive) if isinstance(reduction, SoftplusSum) else ()
        self._zeros = None if self.weights is None else self.weights == 0

    def excluded(self, panel: Panel) -> Selection | None:
        given = self._exclude or self._zeros is not None
        return Selection(self._exclude, panel, self._dim, self._zeros) if given else None

    def positive(self, panel: Panel) -> Selection | None:
        return Selection(self._positive, panel, self._dim) if self._positive else None

    def of_owners(self, values: Tensor, panel: Panel) -> Tensor:
        """The entries, of a vector along the owners, that belong to this panel, to broadcast over their pairs."""
        return values[panel.owners(self._dim)].unsqueeze(self._dim)

    def sum(self, terms: Tensor, panel: Panel) -> Tensor:
        """The weighted sum of each owner."""
        if self.weights is None:
            return terms.sum(self._dim)
        return (terms if self._dim == 1 else terms.T).mv(panel.along(self.weights, self._dim))

    def weigh_(self, gradient: Tensor, panel: Panel, coefficient: Tensor) -> None:
        """Times the owner's coefficient and the pair's weight."""
        gradient.mul_(self.of_owners(coefficient, panel))
        if self.weights is not None:
            gradient.mul_(panel.along(self.weights, self._dim).unsqueeze(1 - self._dim))


class State:
    """What a reduction has come to so far."""

    def results(self) -> list[Tensor]:
        raise NotImplementedError

    def statistics(self) -> list[Tensor]:
        """What the backward must know, as many vectors [owners] as `STATISTICS` says."""
        return []


class DenseState(State):
    """One that looks at every pair."""

    #: Whether its panels are to be some whole columns of a tile, and not some whole rows.
    by_strip = False

    def update(self, panel: Panel, scratch: Tensor) -> None:
        """Take in a panel. `scratch` has its shape and may be overwritten; the panel may not."""
        raise NotImplementedError


class _Softmax(DenseState):
    """Running maximum and sum of exp(score - maximum), as in the online softmax (arXiv:1805.02867)."""

    def __init__(self, reduction: LogSumExp | SoftmaxMean, dim: int, operands: Operands) -> None:
        self.pairs, self.dim = Pairs(reduction, dim), dim
        self.maximum = operands.scale.new_full((operands.length(dim),), -torch.inf)
        self.total = torch.zeros_like(self.maximum)

    def scores(self, panel: Panel, scratch: Tensor) -> Tensor:
        """What is exponentiated: of the panel itself, or written to the scratch."""
        raise NotImplementedError

    def update(self, panel: Panel, scratch: Tensor) -> None:
        excluded, scores = self.pairs.excluded(panel), self.scores(panel, scratch)
        if excluded is not None:
            scores = scratch if scores is scratch else scratch.copy_(scores)
            excluded.fill_(scores, -torch.inf)
        owners = panel.owners(self.dim)
        maximum = torch.maximum(self.maximum[owners], scores.amax(self.dim))
        shift = finite(maximum)
        terms = exp_(torch.sub(scores, shift.unsqueeze(self.dim), out=scratch))
        if excluded is not None:
            excluded.fill_(terms, 0)
        self.add(terms, self.maximum[owners].sub_(shift).exp_(), panel)
        self.maximum[owners] = maximum

    def add(self, terms: Tensor, decay: Tensor, panel: Panel) -> None:
        """Take in exponentials, after what is there has decayed by the rise of the maximum."""
        self.total[panel.owners(self.dim)].mul_(decay).add_(self.pairs.sum(terms, panel))

    def sum(self) -> Tensor:
        return self.total.masked_fill(self.maximum == -torch.inf, 0)

    def statistics(self) -> list[Tensor]:
        # The pair, not the log-sum-exp: rounding the latter would cost a relative 4e-6 in each weight at S = 100.
        return [finite(self.maximum), self.sum()]


class _LogSumExp(_Softmax):
    def __init__(self, reduction: LogSumExp, dim: int, operands: Operands) -> None:
        super().__init__(reduction, dim, operands)
        self.of = reduction.of

    def scores(self, panel: Panel, scratch: Tensor) -> Tensor:
        if isinstance(self.of, Paced):
            return paced(panel.scores, self.of, pace_slope(panel.scores, self.of), out=scratch)
        return panel.of(self.of)

    def results(self) -> list[Tensor]:
        return [self.sum().log_().add_(finite(self.maximum))]


class _SoftmaxMean(_Softmax):
    """Beside the sum of the exponentials that of the exponentials times A, under the same maximum."""

    def __init__(self, reduction: SoftmaxMean, dim: int, operands: Operands) -> None:
        super().__init__(reduction, dim, operands)
        self.reduction = reduction
        self.averaged = torch.zeros_like(self.total)

    def scores(self, panel: Panel, scratch: Tensor) -> Tensor:
        under, sharpness = panel.of(self.reduction.under), self.reduction.sharpness
        return under if sharpness == 1 else torch.mul(under, sharpness, out=scratch)

    def add(self, terms: Tensor, decay: Tensor, panel: Panel) -> None:
        super().add(terms, decay, panel)
        terms.mul_(panel.of(self.reduction.of))
        self.averaged[panel.owners(self.dim)].mul_(decay).add_(self.pairs.sum(terms, panel))

    def mean(self) -> Tensor:
        total = self.sum()
        return (self.averaged / total).masked_fill_(total == 0, 0)

    def results(self) -> list[Tensor]:
        return [self.mean()]

    def statistics(self) -> list[Tensor]:
        return [*super().statistics(), self.mean()]


class _Sum(DenseState):
    """A sum of terms, each of one score."""

    def __init__(self, reduction: SoftplusSum | Hinge | Count, dim: int, operands: Operands) -> None:
        self.pairs, self.dim = Pairs(reduction, dim), dim
        self.total = operands.scale.new_zeros(operands.length(dim))

    def terms(self, panel: Panel, scratch: Tensor) -> Tensor:
        """Those of all pairs, written to the scratch."""
        raise NotImplementedError

    def update(self, panel: Panel, scratch: Tensor) -> None:
        excluded, terms = self.pairs.excluded(panel), self.terms(panel, scratch)
        if excluded is not None:
            excluded.fill_(terms, 0)
        self.total[panel.owners(self.dim)].add_(self.pairs.sum(terms, panel))

    def results(self) -> list[Tensor]:
        return [self.total]


class _SoftplusSum(_Sum):
    def terms(self, panel: Panel, scratch: Tensor) -> Tensor:
        positive, scores = self.pairs.positive(panel), panel.scores
        if positive is not None:
            scores = scores.clone()
            positive.negate_(scores)
        return softplus(scores, out=scratch)


class _Hinge(_Sum):
    def __init__(self, reduction: Hinge | Count, dim: int, operands: Operands) -> None:
        super().__init__(reduction, dim, operands)
        self.thresholds = reduction.thresholds

    def terms(self, panel: Panel, scratch: Tensor) -> Tensor:
        return torch.sub(panel.scores, self.pairs.of_owners(self.thresholds, panel), out=scratch).clamp_min_(0)


class _Count(_Hinge):
    def terms(self, panel: Panel, scratch: Tensor) -> Tensor:
        return torch.gt(panel.scores, self.pairs.of_owners(self.thresholds, panel), out=scratch)


class _Chosen(DenseState):
    """The k largest so far. Panels come in ascending order of the pairs, which decides among equals."""

    def __init__(self, reduction: Chosen, dim: int, operands: Operands) -> None:
        self.exclude, self.of, self.k, self.dim = rules_of(reduction.exclude), taught(reduction), reduction.k, dim
        self.by_strip = dim == 0  # a column's list is merged once for each tile, not for each few rows of it
        self.values = operands.scale.new_full((operands.length(dim), self.k), -torch.inf)
        self.indices = torch.full_like(self.values, -1, dtype=torch.int64)

    def update(self, panel: Panel, scratch: Tensor) -> None:
        scores = panel.of(self.of)
        if self.exclude or self.dim == 0:
            excluded, scores = Selection(self.exclude, panel, self.dim), scratch.copy_(scores)
            excluded.fill_(scores, -torch.inf)
        owners, first = panel.owners(self.dim), panel.owners(1 - self.dim).start
        values, indices = largest(scores if self.dim == 1 else scores.T, self.k)
        indices = (indices + first).masked_fill_(values == -torch.inf, -1)
        self.values[owners], self.indices[owners] = merged(
            self.values[owners], self.indices[owners], values, indices, self.k
        )

    def results(self) -> list[Tensor]:
        return [self.values, self.indices]


class _PairScore(State):
    def __init__(self, reduction: PairScore, dim: int, operands: Operands, budget: int) -> None:
        self.scores = pair_scores(operands, reduction.pair, dim, budget).to(operands.scale.dtype)

    def results(self) -> list[Tensor]:
        return [self.scores]


_DENSE: dict[type, type] = {
    LogSumExp: _LogSumExp,
    SoftplusSum: _SoftplusSum,
    SoftmaxMean: _SoftmaxMean,
    Hinge: _Hinge,
    Count: _Count,
    Chosen: _Chosen,
}


def state_of(reduction: Served, dim: int, operands: Operands, budget: int) -> State:
    """An empty state, or the full one of what needs no tile. dim: 1 for a reduction of rows, 0 for one of columns."""
    if isinstance(reduction, PairScore):
        return _PairScore(reduction, dim, operands, budget)
    state: DenseState = _DENSE[type(reduction)](reduction, dim, operands)
    return state
