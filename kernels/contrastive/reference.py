"""The dense formulas, in plain autograd: the oracle of every other backend."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .reductions import (
    Above,
    Chosen,
    ColumnRange,
    Count,
    Diagonal,
    DifferentId,
    Hinge,
    LogSumExp,
    Paced,
    PairRule,
    PairRules,
    PairScore,
    SameId,
    Served,
    SoftmaxMean,
    SoftplusSum,
    Target,
    Teacher,
    rules_of,
)


def _rule_mask(logits: Tensor, rule: PairRule, dim: int) -> Tensor:
    """bool [N, M]: the pairs that the rule names, in a reduction over dimension `dim`."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    match rule:
        case Diagonal():
            return torch.arange(logits.shape[0], device=logits.device)[:, None] + rule.offset == columns
        case Target():
            return rule.columns[:, None] == columns
        case SameId():
            return rule.rows[:, None] == rule.cols
        case DifferentId():
            return rule.rows[:, None] != rule.cols
        case ColumnRange():
            return ((rule.start <= columns) & (columns < rule.stop)).expand(logits.shape)
        case Above():
            above = logits.detach() > rule.thresholds.unsqueeze(dim)
            return above & ~_rule_mask(logits, rule.pair, dim)
    raise TypeError(f"{rule!r}: the operator resolves it before a backend sees it")


def _mask(logits: Tensor, rules: PairRules | None, dim: int) -> Tensor:
    masks = [_rule_mask(logits, rule, dim) for rule in rules_of(rules)]
    return functools.reduce(torch.logical_or, masks, torch.zeros_like(logits, dtype=torch.bool))


class _Matrices:
    """S and the teachers' similarities, each made once."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._taught: dict[Teacher, Tensor] = {}

    def of(self, teacher: Teacher | None) -> Tensor:
        if teacher is None:
            return self.logits
        if teacher not in self._taught:
            dtype = self.logits.dtype
            self._taught[teacher] = _scaled(teacher.x.to(dtype), teacher.y.to(dtype), torch.as_tensor(teacher.scale))
        return self._taught[teacher]

    def excluded(self, reduction: LogSumExp | SoftplusSum | SoftmaxMean | Hinge | Count, dim: int) -> Tensor:
        excluded = _mask(self.logits, reduction.exclude, dim)
        if reduction.weights is not None:
            excluded = excluded | (reduction.weights == 0).unsqueeze(1 - dim)
        return excluded


def _scaled(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return (scale[:, None] if scale.dim() else scale) * (x @ y.T)


def _log_weighted(scores: Tensor, weights: Tensor | None, dim: int) -> Tensor:
    """log(w_j exp(scores)); where w is 0 the pair is excluded anyway."""
    return scores if weights is None else scores + weights.masked_fill(weights == 0, 1).log().unsqueeze(1 - dim)


def _log_sum_exp(matrices: _Matrices, reduction: LogSumExp, dim: int) -> Tensor:
    excluded = matrices.excluded(reduction, dim)
    if isinstance(reduction.of, Paced):
        pace, logits = reduction.of, matrices.logits
        scores = pace.gain * F.relu(pace.slope * logits.detach() + pace.offset) * (logits - pace.center)
    else:
        scores = matrices.of(reduction.of)
    scores = _log_weighted(scores, reduction.weights, dim)
    empty = excluded.all(dim)
    # An all -inf row has the gradient NaN; such rows are taken whole and replaced afterwards.
    allowed = scores.masked_fill(excluded & ~empty.unsqueeze(dim), -torch.inf)
    return torch.logsumexp(allowed, dim).masked_fill(empty, -torch.inf)


def _softmax_mean(matrices: _Matrices, reduction: SoftmaxMean, dim: int) -> Tensor:
    excluded = matrices.excluded(reduction, dim)
    scores = _log_weighted(reduction.sharpness * matrices.of(reduction.under), reduction.weights, dim)
    empty = excluded.all(dim)
    weights = scores.masked_fill(excluded & ~empty.unsqueeze(dim), -torch.inf).softmax(dim)
    terms = (weights * matrices.of(reduction.of)).masked_fill(excluded, 0)
    return terms.sum(dim).masked_fill(empty, 0)


def _hinge(matrices: _Matrices, reduction: Hinge | Count, dim: int) -> Tensor:
    above = matrices.logits - reduction.thresholds.unsqueeze(dim)
    terms = F.relu(above) if isinstance(reduction, Hinge) else (above > 0).to(above.dtype)
    terms = terms.masked_fill(matrices.excluded(reduction, dim), 0)
    return (terms if reduction.weights is None else terms * reduction.weights.unsqueeze(1 - dim)).sum(dim)


def _chosen(matrices: _Matrices, reduction: Chosen, dim: int) -> tuple[Tensor, Tensor]:
    scores = matrices.of(reduction.of).masked_fill(_mask(matrices.logits, reduction.exclude, dim), -torch.inf)
    if dim == 0:
        scores = scores.T
    scores = F.pad(scores, (0, max(0, reduction.k - scores.shape[1])), value=-torch.inf)
    # Stable, so that among equals the lowest index comes first.
    indices = scores.detach().argsort(dim=1, descending=True, stable=True)[:, : reduction.k]
    values = scores.gather(1, indices)
    return values, indices.masked_fill(values == -torch.inf, -1)


def _softplus_sum(matrices: _Matrices, reduction: SoftplusSum, dim: int) -> Tensor:
    logits, excluded = matrices.logits, matrices.excluded(reduction, dim)
    signed = torch.where(_mask(logits, reduction.positive, dim), -logits, logits).masked_fill(excluded, 0)
    losses = -F.logsigmoid(-signed)
    if reduction.weights is not None:
        losses = losses * reduction.weights.unsqueeze(1 - dim)
    return losses.masked_fill(excluded, 0).sum(dim)


def _pair_score(logits: Tensor, reduction: PairScore, dim: int) -> Tensor:
    if isinstance(reduction.pair, Target):
        targets = reduction.pair.columns
        if not logits.shape[1]:
            return logits.new_full(targets.shape, -torch.inf)
        scores = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        return scores.masked_fill(targets < 0, -torch.inf)
    offset = reduction.pair.offset if dim == 1 else -reduction.pair.offset
    diagonal = torch.diagonal(logits if dim == 1 else logits.T, offset) if logits.numel() else logits.new_empty(0)
    before = min(max(-offset, 0), logits.shape[1 - dim])
    return F.pad(diagonal, (before, logits.shape[1 - dim] - before - len(diagonal)), value=-torch.inf)


def similarity_reduce(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    rows: tuple[Served, ...],
    cols: tuple[Served, ...],
    budget: int,
) -> tuple[Tensor, ...]:
    """Row results, then column results, in the dtype of scale. The budget is not kept: S is dense here."""
    logits = _scaled(x.to(scale.dtype), y.to(scale.dtype), scale)
    if bias is not None:
        logits = logits + bias
    if row_bias is not None:
        logits = logits + row_bias[:, None]
    if col_bias is not None:
        logits = logits + col_bias
    matrices = _Matrices(logits)
    return tuple(
        result
        for dim, reductions in ((1, rows), (0, cols))
        for reduction in reductions
        for result in _results(matrices, reduction, dim)
    )


def _results(matrices: _Matrices, reduction: Served, dim: int) -> tuple[Tensor, ...]:
    match reduction:
        case LogSumExp():
            return (_log_sum_exp(matrices, reduction, dim),)
        case SoftplusSum():
            return (_softplus_sum(matrices, reduction, dim),)
        case PairScore():
            return (_pair_score(matrices.logits, reduction, dim),)
        case SoftmaxMean():
            return (_softmax_mean(matrices, reduction, dim),)
        case Hinge() | Count():
            return (_hinge(matrices, reduction, dim),)
        case Chosen():
            return _chosen(matrices, reduction, dim)
    raise TypeError(f"{reduction!r}: the operator resolves it before a backend sees it")
