"""The dense formulas, in plain autograd: the oracle of every other backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reductions import Diagonal, LogSumExp, PairScore, Reduction, SoftplusSum


def _pair_mask(logits: Tensor, rule: Diagonal | None) -> Tensor:
    """bool [N, M]: the pairs that the rule names."""
    mask = torch.zeros_like(logits, dtype=torch.bool)
    if rule is not None and logits.numel():
        mask.diagonal(rule.offset).fill_(True)
    return mask


def _log_sum_exp(logits: Tensor, reduction: LogSumExp, dim: int) -> Tensor:
    excluded = _pair_mask(logits, reduction.exclude)
    empty = excluded.all(dim)
    # An all -inf row has the gradient NaN; such rows are taken whole and replaced afterwards.
    allowed = logits.masked_fill(excluded & ~empty.unsqueeze(dim), -torch.inf)
    return torch.logsumexp(allowed, dim).masked_fill(empty, -torch.inf)


def _softplus_sum(logits: Tensor, reduction: SoftplusSum, dim: int) -> Tensor:
    signed = torch.where(_pair_mask(logits, reduction.positive), -logits, logits)
    return -F.logsigmoid(-signed).sum(dim)


def _pair_score(logits: Tensor, reduction: PairScore, dim: int) -> Tensor:
    offset = reduction.pair.offset if dim == 1 else -reduction.pair.offset
    diagonal = torch.diagonal(logits if dim == 1 else logits.T, offset) if logits.numel() else logits.new_empty(0)
    before = min(max(-offset, 0), logits.shape[1 - dim])
    return F.pad(diagonal, (before, logits.shape[1 - dim] - before - len(diagonal)), value=-torch.inf)


def similarity_reduce(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, rows: tuple[Reduction, ...], cols: tuple[Reduction, ...]
) -> tuple[Tensor, ...]:
    """Row results, then column results; x, y, scale and bias in one accumulation dtype."""
    logits = scale * (x @ y.T)
    if bias is not None:
        logits = logits + bias
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
