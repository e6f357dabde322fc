"""What a reduction has come to over a part of its pairs, so that parts can be joined: vectors along the owners.

LogSumExp       shift, sum of w exp(score - shift)      (float64)
SoftmaxMean     the same of its softmax, and the mean   (float64)
a sum           the sum                                 (float64)
PairScore       the score, -inf where the pair lies elsewhere
Chosen          scores and indices [owners, k]
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import exact_dtype
from .reductions import Chosen, LogSumExp, PairScore, Served, SoftmaxMean
from .torch_largest import ordered

Partial = list[Tensor]


def of_nothing(reduction: Served, owners: int, like: Tensor) -> Partial:
    """Over no pair. `like` has the dtype and device of the results."""
    if isinstance(reduction, Chosen):
        scores = like.new_full((owners, reduction.k), -torch.inf)
        return [scores, torch.full_like(scores, -1, dtype=torch.int64)]
    if isinstance(reduction, PairScore):
        return [like.new_full((owners,), -torch.inf)]
    exact = exact_dtype(like.device)
    return [like.new_zeros(owners, dtype=exact) for _ in range(vectors(reduction))]


def vectors(reduction: Served) -> int:
    """How many tensors a partial result is."""
    if isinstance(reduction, (LogSumExp, Chosen)):
        return 2
    return 3 if isinstance(reduction, SoftmaxMean) else 1


def of_results(reduction: Served, results: list[Tensor], statistics: list[Tensor]) -> Partial:
    """From a backend's results, and what its backward needs to know."""
    if isinstance(reduction, (PairScore, Chosen)):
        return results
    kept = statistics if isinstance(reduction, (LogSumExp, SoftmaxMean)) else results
    return [each.to(exact_dtype(each.device)) for each in kept]


def joined(reduction: Served, a: Partial, b: Partial) -> Partial:
    """Over the pairs of both, which share none. The indices of `Chosen` are positions in the whole matrix."""
    if isinstance(reduction, Chosen):
        scores, indices = (torch.cat(both, 1) for both in zip(a, b, strict=True))
        # Among equal scores the lowest index comes first, in whatever order the parts were met.
        indices, order = indices.sort(dim=1, stable=True)
        scores, indices = ordered(scores.gather(1, order), indices)
        return [scores[:, : reduction.k].contiguous(), indices[:, : reduction.k].contiguous()]
    if isinstance(reduction, PairScore):
        return [torch.maximum(a[0], b[0])]
    if not isinstance(reduction, (LogSumExp, SoftmaxMean)):
        return [a[0] + b[0]]
    empty = a[1] == 0, b[1] == 0
    shift = torch.where(empty[0], b[0], torch.where(empty[1], a[0], torch.maximum(a[0], b[0])))
    sums = [(part[1] * (part[0] - shift).exp()).masked_fill(none, 0) for part, none in zip((a, b), empty, strict=True)]
    total = sums[0] + sums[1]
    if isinstance(reduction, LogSumExp):
        return [shift, total]
    mean = (sums[0] * a[2]).masked_fill(empty[0], 0) + (sums[1] * b[2]).masked_fill(empty[1], 0)
    return [shift, total, (mean / total).masked_fill(total == 0, 0)]


def results_of(reduction: Served, partial: Partial, dtype: torch.dtype) -> list[Tensor]:
    """What a backend would have given for all pairs at once."""
    if isinstance(reduction, Chosen):
        return partial
    if isinstance(reduction, LogSumExp):
        return [(partial[1].log() + partial[0]).to(dtype)]
    return [partial[-1].to(dtype)]


def statistics_of(reduction: Served, partial: Partial) -> list[Tensor]:
    """What a backward needs to know, in float64."""
    return partial if isinstance(reduction, (LogSumExp, SoftmaxMean)) else []
