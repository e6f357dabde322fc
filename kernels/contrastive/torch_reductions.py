"""What the torch backend does with one panel of scores, for each reduction: its statistics and its gradient.

A reduction is two classes here: a *state*, which takes in panels and gives the result and what the backward
must know (`dense` if it looks at every pair, else it is filled without the tiles), and a *gradient*, which turns a panel of scores into d(result . upstream gradient) / dS in place.
Statistics of both directions are running (maximum, sum) pairs, in float32 or wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reductions import Diagonal, LogSumExp, PairScore, SoftplusSum


@dataclass
class Panel:
    """Scores of rows `rows` against columns `cols`, and where they lie in S."""

    scores: Tensor
    rows: slice
    cols: slice

    def pairs(self, rule: Diagonal) -> Tensor:
        """View of the scores at the pairs of the rule that lie in this panel."""
        return torch.diagonal(self.scores, rule.offset + self.rows.start - self.cols.start)

    def paired(self, rule: Diagonal, dim: int) -> slice:
        """Global indices, along the reduction's own axis, of the rows (columns) that `pairs` belongs to."""
        start = max(self.rows.start, self.cols.start - rule.offset)
        stop = max(start, min(self.rows.stop, self.cols.stop - rule.offset))
        return slice(start, stop) if dim == 1 else slice(start + rule.offset, stop + rule.offset)

    def owners(self, dim: int) -> slice:
        return self.rows if dim == 1 else self.cols


class _LogSumExpState:
    """Running maximum and sum of exp(S - maximum), as in the online softmax (arXiv:1805.02867)."""

    dense = True

    def __init__(self, reduction: LogSumExp, dim: int, length: int, like: Tensor) -> None:
        self.exclude, self.dim = reduction.exclude, dim
        self.maximum = like.new_full((length,), -torch.inf)
        self.total = like.new_zeros(length)

    def update(self, panel: Panel, scratch: Tensor) -> None:
        kept = None
        if self.exclude is not None:
            pairs = panel.pairs(self.exclude)
            kept = pairs.clone()
            pairs.fill_(-torch.inf)
        owners = panel.owners(self.dim)
        maximum = torch.maximum(self.maximum[owners], panel.scores.amax(self.dim))
        shift = _finite(maximum)
        weights = _exp_(torch.sub(panel.scores, shift.unsqueeze(self.dim), out=scratch))
        if self.exclude is not None and kept is not None:
            Panel(weights, panel.rows, panel.cols).pairs(self.exclude).zero_()
            panel.pairs(self.exclude).copy_(kept)
        total = self.total[owners]
        total.mul_(self.maximum[owners].sub_(shift).exp_()).add_(weights.sum(self.dim))
        self.maximum[owners] = maximum

    def _sum(self) -> Tensor:
        return self.total.masked_fill(self.maximum == -torch.inf, 0)

    def result(self) -> Tensor:
        return self._sum().log_().add_(_finite(self.maximum))

    def statistics(self) -> list[Tensor]:
        # The pair, not the log-sum-exp: rounding the latter would cost a relative 4e-6 in each weight at S = 100.
        return [_finite(self.maximum), self._sum()]


class _SoftplusSumState:
    dense = True

    def __init__(self, reduction: SoftplusSum, dim: int, length: int, like: Tensor) -> None:
        self.positive, self.dim = reduction.positive, dim
        self.total = like.new_zeros(length)

    def update(self, panel: Panel, scratch: Tensor) -> None:
        losses = _softplus(panel.scores, out=scratch)
        if self.positive is not None:
            positive = Panel(losses, panel.rows, panel.cols).pairs(self.positive)
            positive.copy_(_softplus(-panel.pairs(self.positive)))
        self.total[panel.owners(self.dim)].add_(losses.sum(self.dim))

    def result(self) -> Tensor:
        return self.total

    def statistics(self) -> list[Tensor]:
        return []


class _PairScoreState:
    """Needs no tile: N products, taken in float64, since a well aligned batch's gradient hangs on them alone."""

    dense = False

    def __init__(self, reduction: PairScore, dim: int, length: int, like: Tensor) -> None:
        self.offset, self.dim = reduction.pair.offset, dim
        self.scores = like.new_full((length,), -torch.inf)

    def fill(self, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, budget: int) -> None:
        exact = torch.float64 if x.device.type != "mps" else self.scores.dtype
        first, last = max(0, -self.offset), min(x.shape[0], y.shape[0] - self.offset)
        step = max(1, budget // (4 * exact.itemsize * max(1, x.shape[1])))
        for start in range(first, last, step):
            stop = min(start + step, last)
            y_pairs = y[start + self.offset : stop + self.offset].to(exact)
            pairs = torch.linalg.vecdot(x[start:stop].to(exact), y_pairs).mul_(scale)
            if bias is not None:
                pairs.add_(bias)
            shift = 0 if self.dim == 1 else self.offset
            self.scores[start + shift : stop + shift] = pairs

    def result(self) -> Tensor:
        return self.scores

    def statistics(self) -> list[Tensor]:
        return []


class _LogSumExpGradient:
    """dLSE_i / dS_ij = exp(S_ij - LSE_i), and 0 for an excluded pair."""

    dense = True

    def __init__(self, reduction: LogSumExp, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.exclude, self.dim = reduction.exclude, dim
        self.maximum, total = statistics
        self.coefficient = (grad / total).masked_fill_(total == 0, 0)

    def apply_(self, panel: Panel) -> None:
        owners = panel.owners(self.dim)
        _exp_(panel.scores.sub_(self.maximum[owners].unsqueeze(self.dim)))
        if self.exclude is not None:
            panel.pairs(self.exclude).zero_()
        panel.scores.mul_(self.coefficient[owners].unsqueeze(self.dim))


class _SoftplusSumGradient:
    """d softplus(-z S) / dS = -z sigmoid(-z S)."""

    dense = True

    def __init__(self, reduction: SoftplusSum, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.positive, self.dim, self.grad = reduction.positive, dim, grad

    def apply_(self, panel: Panel) -> None:
        weights = None
        if self.positive is not None:
            weights = panel.pairs(self.positive).neg().sigmoid_().neg_()
        panel.scores.sigmoid_()
        if weights is not None:
            panel.pairs(self.positive).copy_(weights)  # type: ignore[arg-type]
        panel.scores.mul_(self.grad[panel.owners(self.dim)].unsqueeze(self.dim))


class _PairScoreGradient:
    dense = False

    def __init__(self, reduction: PairScore, dim: int, grad: Tensor, statistics: list[Tensor]) -> None:
        self.pair, self.dim, self.grad = reduction.pair, dim, grad

    def apply_(self, panel: Panel) -> None:
        panel.pairs(self.pair).add_(self.grad[panel.paired(self.pair, self.dim)])


#: Of each reduction: `state(reduction, dim, length, like)`, dim 1 for rows, 0 for columns.
STATES: dict[type, Any] = {LogSumExp: _LogSumExpState, SoftplusSum: _SoftplusSumState, PairScore: _PairScoreState}
#: `gradient(reduction, dim, upstream gradient, statistics)`; `dense` as above, else it adds to the pairs alone.
GRADIENTS: dict[type, Any] = {
    LogSumExp: _LogSumExpGradient,
    SoftplusSum: _SoftplusSumGradient,
    PairScore: _PairScoreGradient,
}


def _finite(maximum: Tensor) -> Tensor:
    """0 where the maximum is infinite, so that exp(S - maximum) is 0 or inf there, never NaN."""
    return maximum.masked_fill(maximum.isinf(), 0)


def _exp_(scores: Tensor) -> Tensor:
    """exp, in place, of scores whose largest is 0 or more: what would underflow becomes the least normal number.

    Beside a 1 in the same sum that is nothing, and torch's exp on CPU takes ten times as long where it underflows.
    """
    return scores.clamp_min_(math.log(torch.finfo(scores.dtype).tiny) + 0.1).exp_()


def _softplus(scores: Tensor, out: Tensor | None = None) -> Tensor:
    # F.softplus turns linear above its threshold, which float64 would notice.
    if scores.device.type != "cpu":
        return torch.logaddexp(scores, scores.new_zeros(()), out=out)
    # On CPU logaddexp takes ten times as long as exp, for its log1p. With u = 1 + e rounded, log1p(e) is
    # log(u) + (e - (u - 1)) / u to the last digit: what rounding took from u is known exactly.
    small = _exp_(torch.abs(scores, out=out).neg_())
    one_more = small + 1
    spare = one_more - 1
    small.sub_(spare).div_(one_more).add_(one_more.log_())
    return small.add_(torch.clamp(scores, min=0, out=spare))
