"""Sparse vectors over a vocabulary or a codebook, from the maximum of a projection over a sample's tokens."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..contrastive.arguments import described
from ..distributed import gather, gather_counts
from .pair_formulas import check_positive
from .project_max import project_max

_WEIGHTS = ("sparsemax", "softmax", "sigmoid")


def lexical_vector(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    precision: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """log(1 + max_l relu(<hidden_bl, weight_v> + bias_v)): a sample as weights of words (LexLIP, arXiv:2302.02908).

    Also LexVLA's head (arXiv:2407.17827). The logits [B, L, V] are never in memory.

    Args:
        hidden, weight, bias, mask, precision, memory_budget: as in `project_max`.

    Returns:
        [B, V], not negative, float32 (float64 for float64 inputs); 0 for a sample whose tokens are all masked.

    Raises:
        ValueError, TypeError: as `project_max`.
    """
    largest = project_max(hidden, weight, bias, mask, precision=precision, memory_budget=memory_budget)
    return largest.relu().log1p()


def flops_regulariser(vectors: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """sum_v (mean_b |vectors_bv|)^2: how many products an inverted index has to make (arXiv:2004.05665).

    Of vectors that `lexical_vector` gave it costs no further sweep of the logits. With a group the mean is that of all ranks'
    samples; the value is the same on each, and the mean of the gradients over ranks is the exact one.

    Args:
        vectors: [B, V].
        group: a torch.distributed process group, or None for one process.

    Returns:
        A scalar; NaN without any sample.

    Raises:
        ValueError: anything but a floating point matrix.
    """
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or not vectors.is_floating_point():
        raise ValueError(f"vectors is {described(vectors)}: expected a floating point tensor [batch, columns]")
    sums = vectors.abs().sum(0, keepdim=True)
    count = gather_counts(len(vectors), device=vectors.device, group=group).total
    if group is not None:
        # Each rank's gradient reaches the others' sums: their mean over ranks is the gradient of one value.
        _, (sums,) = gather(sums, group=group)
    mean = sums.sum(0) / count if count else sums.sum(0) * torch.nan
    return mean.square().sum()


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """The point of the simplex that is closest to the scores, most of whose entries are 0 (arXiv:1602.02068).

        p_k = [z_k - tau]_+  with tau such that sum_k p_k = 1

    Args:
        scores: floating point, any shape; -inf gives 0.
        dim: that sums to 1.

    Returns:
        Like `scores`, differentiable: over the K entries that are not 0 the gradient is g - mean(g).
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    with torch.no_grad():
        largest = wide.amax(dim, keepdim=True)
    # Only differences count, and those of large scores are exact where their sums are not.
    wide = wide - largest.masked_fill(largest == -torch.inf, 0)
    with torch.no_grad():
        ordered = wide.sort(dim=dim, descending=True).values
        shape = [1] * wide.dim()
        shape[dim] = -1
        rank = torch.arange(1, wide.shape[dim] + 1, device=wide.device, dtype=wide.dtype).view(shape)
        size = (1 + rank * ordered > ordered.cumsum(dim)).sum(dim, keepdim=True)
        # By value: equals are all in or all out.
        support = wide >= ordered.take_along_dim(size - 1, dim)
    inside = wide.masked_fill(~support, 0)
    tau = (inside.sum(dim, keepdim=True) - 1) / support.sum(dim, keepdim=True)
    found = (inside - tau).masked_fill(~support, 0).clamp(min=0)
    return found.masked_fill(largest.isnan(), torch.nan).to(scores.dtype)


def finite_tokens(
    tokens: Tensor,
    codebook: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    weights: str = "sparsemax",
    padding_scores_zero: bool = False,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A sample as a sparse mean of codes that images and texts share: the finite discrete tokens of FDT (arXiv:2303.14865).

        r_bv = max_l <token_bl, code_v> / (sqrt(D) temperature),   w = sparsemax(r),   f = w C

    The products [B, L, V] are never in memory.

    Args:
        tokens: [B, L, D], already projected to the codes' space.
        codebook: C [V, D].
        mask: bool [B, L], True for tokens that count; None: all.
        temperature: above 0.
        weights: "sparsemax", "softmax" or "sigmoid".
        padding_scores_zero: let a masked token score 0 in the maximum, as the authors' code does, instead of nothing.
        memory_budget: as in `project_max`.

    Returns:
        (features f [B, D], weights w [B, V]), float32 (float64 for float64 inputs). Both are 0, without gradient, for a
        sample whose tokens are all masked, unless `padding_scores_zero`.

    Raises:
        ValueError, TypeError: as `project_max`, or options out of their range.
    """
    if weights not in _WEIGHTS:
        raise ValueError(f"weights={weights!r}: expected one of {', '.join(_WEIGHTS)}")
    check_positive(temperature=temperature)
    largest = project_max(tokens, codebook, None, mask, memory_budget=memory_budget)
    empty = None
    if mask is not None and padding_scores_zero:
        largest = torch.where((~mask).any(1, keepdim=True), largest.clamp(min=0), largest)
    elif mask is not None:
        empty = ~mask.any(1, keepdim=True)
        largest = largest.masked_fill(empty, 0)
    scores = largest / (math.sqrt(tokens.shape[2]) * temperature)
    found = (
        sparsemax(scores) if weights == "sparsemax" else scores.softmax(1) if weights == "softmax" else scores.sigmoid()
    )
    if empty is not None:
        found = found.masked_fill(empty, 0)
    with torch.autocast(tokens.device.type, enabled=False):
        return found @ codebook.to(found.dtype), found
