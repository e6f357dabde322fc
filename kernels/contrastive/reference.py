"""The dense formulas, in plain autograd: the oracle of every other backend."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .reductions import (
    Above,
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


def _excluded(logits: Tensor, reduction: LogSumExp | SoftplusSum, dim: int) -> Tensor:
    excluded = _mask(logits, reduction.exclude, dim)
    if reduction.weights is not None:
        excluded = excluded | (reduction.weights == 0).unsqueeze(1 - dim)
    return excluded


def _log_sum_exp(logits: Tensor, reduction: LogSumExp, dim: int) -> Tensor:
    excluded = _excluded(logits, reduction, dim)
    if reduction.weights is not None:
        logits = logits + reduction.weights.masked_fill(reduction.weights == 0, 1).log().unsqueeze(1 - dim)
    empty = excluded.all(dim)
    # An all -inf row has the gradient NaN; such rows are taken whole and replaced afterwards.
    allowed = logits.masked_fill(excluded & ~empty.unsqueeze(dim), -torch.inf)
    return torch.logsumexp(allowed, dim).masked_fill(empty, -torch.inf)


def _softplus_sum(logits: Tensor, reduction: SoftplusSum, dim: int) -> Tensor:
    excluded = _excluded(logits, reduction, dim)
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
    rows: tuple[Reduction, ...],
    cols: tuple[Reduction, ...],
    budget: int,
) -> tuple[Tensor, ...]:
    """Row results, then column results, in the dtype of scale. The budget is not kept: S is dense here."""
    logits = (scale[:, None] if scale.dim() else scale) * (x.to(scale.dtype) @ y.to(scale.dtype).T)
    if bias is not None:
        logits = logits + bias
    if row_bias is not None:
        logits = logits + row_bias[:, None]
    if col_bias is not None:
        logits = logits + col_bias
    results = []
    for dim, reductions in ((1, rows), (0, cols)):
        for reduction in reductions:
            match reduction:
                case LogSumExp():
                    results.append(_log_sum_exp(logits, reduction, dim))
                case SoftplusSum():
                    results.append(_softplus_sum(logits, reduction, dim))
                case PairScore():
                    results.append(_pair_score(logits, reduction, dim))
    return tuple(results)
