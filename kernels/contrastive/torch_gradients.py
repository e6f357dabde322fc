"""What the torch backend makes of one panel of scores, for each reduction, in the backward.

A reduction is a *gradient* here: d(result . upstream gradient) / dS, of every pair of a panel or of the own pairs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan, has_gradient, result_count
from .reductions import Diagonal, Hinge, LogSumExp, Paced, PairScore, SoftmaxMean, SoftplusSum, Teacher
from .torch_elementwise import exp_, pace_slope, paced
from .torch_reductions import STATISTICS, Pairs, compared
from .torch_rules import Panel


class Gradient:
    """What a reduction adds to the weights, G = d(results . upstream gradients) / dS."""

    #: The similarities that it looks at, None being S.
    looks_at: set[Teacher | None]


class DenseGradient(Gradient):
    """One of every pair."""

    def write(self, panel: Panel, out: Tensor) -> None:
        """To a tensor of the panel's shape, which may be that of S itself."""
        raise NotImplementedError


class _LogSumExp(DenseGradient):
    """dLSE_i / dv_ij = w_j exp(v_ij - LSE_i), and 0 for an excluded pair, with v = S or a paced function of it."""

    def __init__(self, reduction: LogSumExp, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.pairs, self.pace = Pairs(reduction, dim), reduction.of if isinstance(reduction.of, Paced) else None
        self.looks_at = {None}
        self.shift, total = statistics
        self.coefficient = (grad / total).masked_fill_(total == 0, 0)

    def write(self, panel: Panel, out: Tensor) -> None:
        excluded, shift = self.pairs.excluded(panel), self.pairs.of_owners(self.shift, panel)
        if self.pace is None:
            exp_(torch.sub(panel.scores, shift, out=out))
        else:
            slope = pace_slope(panel.scores, self.pace)
            exp_(paced(panel.scores, self.pace, slope, out=out).sub_(shift)).mul_(slope)
        if excluded is not None:
            excluded.fill_(out, 0)
        self.pairs.weigh_(out, panel, self.coefficient)


class _SoftmaxMean(DenseGradient):
    """p_ij for A, if that is S, and p_ij k (A_ij - mean_i) for B, if that is."""

    def __init__(self, reduction: SoftmaxMean, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.pairs, self.reduction = Pairs(reduction, dim), reduction
        self.looks_at = {*compared(reduction), reduction.under}
        if reduction.under is None:
            self.looks_at.add(reduction.of)
        self.shift, total, self.mean = statistics
        self.coefficient = (grad / total).masked_fill_(total == 0, 0)

    def write(self, panel: Panel, out: Tensor) -> None:
        excluded, factor = self.pairs.excluded(panel), self._factor(panel)
        torch.mul(panel.of(self.reduction.under), self.reduction.sharpness, out=out)
        exp_(out.sub_(self.pairs.of_owners(self.shift, panel)))
        if factor is not None:
            out.mul_(factor)
        if excluded is not None:
            excluded.fill_(out, 0)
        self.pairs.weigh_(out, panel, self.coefficient)

    def _factor(self, panel: Panel) -> Tensor | None:
        """What p_ij is multiplied with; None: 1."""
        of, under, sharpness = self.reduction.of, self.reduction.under, self.reduction.sharpness
        if under is not None:
            return None
        factor = torch.sub(panel.of(of), self.pairs.of_owners(self.mean, panel)).mul_(sharpness)
        return factor.add_(1) if of is None else factor


class _SoftplusSum(DenseGradient):
    """d softplus(-z S) / dS = -z sigmoid(-z S)."""

    def __init__(self, reduction: SoftplusSum, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.pairs, self.grad = Pairs(reduction, dim), grad
        self.looks_at = {None}

    def write(self, panel: Panel, out: Tensor) -> None:
        excluded, positive = self.pairs.excluded(panel), self.pairs.positive(panel)
        if out is not panel.scores:
            out.copy_(panel.scores)
        if positive is not None:
            positive.negate_(out)
        out.sigmoid_()
        if positive is not None:
            positive.negate_(out)
        if excluded is not None:
            excluded.fill_(out, 0)
        self.pairs.weigh_(out, panel, self.grad)


class _Hinge(DenseGradient):
    """w_j where the score is above the threshold."""

    def __init__(self, reduction: Hinge, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.pairs, self.thresholds, self.grad = Pairs(reduction, dim), reduction.thresholds, grad
        self.looks_at = {None}

    def write(self, panel: Panel, out: Tensor) -> None:
        excluded = self.pairs.excluded(panel)
        torch.gt(panel.scores, self.pairs.of_owners(self.thresholds, panel), out=out)
        if excluded is not None:
            excluded.fill_(out, 0)
        self.pairs.weigh_(out, panel, self.grad)


class PairScoreGradient(Gradient):
    """1, at the own pairs."""

    def __init__(self, reduction: PairScore, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.pair, self.dim, self.grad = reduction.pair, dim, grad
        self.looks_at = set()

    def add_(self, panel: Panel) -> None:
        """To weights that are where the scores of S were."""
        if isinstance(self.pair, Diagonal):
            offset = self.pair.offset
            start = max(panel.rows.start, panel.cols.start - offset)
            pairs = panel.diagonal(self.pair)
            first = start if self.dim == 1 else start + offset
            pairs.add_(self.grad[first : first + len(pairs)])
        else:
            columns, inside = panel.targets(self.pair)
            panel.scores.scatter_add_(1, columns, self.grad[panel.rows].unsqueeze(1).masked_fill(~inside, 0))


#: Each made as `gradient(reduction, dim, upstream gradient, statistics)`.
_GRADIENTS: dict[type, type] = {
    LogSumExp: _LogSumExp,
    SoftplusSum: _SoftplusSum,
    PairScore: PairScoreGradient,
    SoftmaxMean: _SoftmaxMean,
    Hinge: _Hinge,
}


def gradients_of(plan: Plan, saved: list[Tensor], grads: list[Tensor]) -> list[Gradient]:
    """Of the reductions that have one; `saved` and `grads` are those of the whole plan, each in a row."""
    found: list[Gradient] = []
    statistics, upstream = iter(saved), iter(grads)
    for dim, each in plan:
        known = [next(statistics) for _ in range(STATISTICS[type(each)])]
        grad, *_ = [next(upstream) for _ in range(result_count(each))]
        if has_gradient(each):
            found.append(_GRADIENTS[type(each)](each, dim, grad, known))
    return found
