"""One vector against several, and vectors of spans of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive.arguments import described
from .maxsim import maxsim, maxsim_varlen


def region_max(
    x: Tensor,
    regions: Tensor,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """max_r <x_i, region_jr>: one vector against the best of several, `maxsim` with one query token.

    ViLLA (arXiv:2308.11194) has attributes against an image's regions, of which images have different numbers; SPRC
    (arXiv:2310.05473) a composed query against 32 tokens of the target, as BLIP-2 has (arXiv:2301.12597); SORCE a text
    against an image's several embeddings.

    Args:
        x: [N, D].
        regions: all images' regions one behind the other [R, D] with their boundaries, or padded [M, L, D].
        cu_seqlens: int32 or int64 [M + 1], ascending from 0 to R: image j has the regions from entry j to entry j + 1.
        mask: bool [M, L] beside padded regions, True for those that count; None: all.
        max_seqlen: the most regions of an image, if known; read back otherwise.
        memory_budget: as in `maxsim`.

    Returns:
        [N, M], float32 (float64 for float64 inputs); the gradient goes to the chosen regions, among equals the first. An
        image without regions gives -inf without gradient.

    Raises:
        ValueError, TypeError: as `maxsim` and `maxsim_varlen`.
    """
    if not isinstance(x, Tensor) or x.dim() != 2:
        raise ValueError(f"x is {described(x)}: expected [N, features]")
    if cu_seqlens is None:
        return maxsim(x.unsqueeze(1), regions, None, mask, memory_budget=memory_budget)
    if mask is not None:
        raise ValueError("cu_seqlens and mask: packed regions have no padding, pass one of the two")
    ones = torch.arange(len(x) + 1, device=x.device)
    return maxsim_varlen(
        *(x, ones, regions, cu_seqlens), max_seqlen_q=1, max_seqlen_d=max_seqlen, memory_budget=memory_budget
    )


def span_means(tokens: Tensor, owners: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """The mean of each span of tokens: a concept's vector from the words that name it (ConceptCLIP, arXiv:2501.15579).

    Packed by their texts, spans are queries of `maxsim_varlen` against patches, and `over_scores` makes a sigmoid loss of it
    with a scale and a bias of its own, which is our reading of that paper's region-concept alignment.

    Args:
        tokens: [B, L, D].
        owners: int64 [S], the text of each span.
        starts, ends: int64 [S], 0 <= start < end <= L: span s has the tokens start to end - 1. Spans may overlap.

    Returns:
        [S, D], float32 (float64 for float64 tokens), differentiable in the tokens.

    Raises:
        ValueError: spans that are empty or leave their text (on the CPU), or shapes that do not fit.

    Example:
        concepts = span_means(word_tokens, owners, starts, ends)  # of texts in ascending order
        scores = maxsim_varlen(concepts, cu_concepts, patches, cu_patches, aggregate="mean")
        loss = over_scores(SigLipLoss(), scores, None, scale, logit_bias=bias)
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 3 or not tokens.is_floating_point():
        raise ValueError(f"tokens is {described(tokens)}: expected a floating point tensor [texts, tokens, features]")
    count, length, width = tokens.shape
    for name, given in (("owners", owners), ("starts", starts), ("ends", ends)):
        if given.shape != owners.shape or given.dim() != 1 or given.dtype != torch.int64:
            raise ValueError(f"{name} is {described(given)}: expected an int64 tensor [spans], as owners is")
    if tokens.device.type == "cpu" and owners.numel():
        inside = (owners >= 0) & (owners < count) & (starts >= 0) & (starts < ends) & (ends <= length)
        if not inside.all():
            worst = int((~inside).nonzero()[0])
            raise ValueError(
                f"span {worst} has the tokens {int(starts[worst])} to {int(ends[worst]) - 1} of text {int(owners[worst])}: "
                f"expected at least one token, within {length} tokens of {count} texts"
            )
    lengths = ends - starts
    ends_of = lengths.cumsum(0)
    before = ends_of - lengths
    first = owners * length + starts - before
    rows = first.repeat_interleave(lengths) + torch.arange(int(lengths.sum()), device=tokens.device)
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).reshape(count * length, width)
    if not owners.numel():
        return wide[:0]
    return F.embedding_bag(rows, wide, before, mode="mean")
