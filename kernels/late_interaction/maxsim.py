"""Late interaction: the score of two sets of tokens from all products of their tokens, never stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive.arguments import described
from .pooling import MaxPooling, Pooling, TopMeanPooling
from .scores import token_scores
from .token_sets import TokenSets, check_mask, packed_sets, padded_sets

_MAX = MaxPooling()


def maxsim(
    q: Tensor,
    d: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    pooling: Pooling = _MAX,
    aggregate: str = "sum",
    normalize: bool = False,
    q_weights: Tensor | None = None,
    precision: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Scores of queries and documents: sum over query tokens of the maximum over document tokens (ColBERT, arXiv:2004.12832).

        score_ij = sum_{p in q_i} max_{r in d_j} <q_ip, d_jr>

    The tensor [Nq, Nd, Lq, Ld] is never in memory, in the forward or the backward. The gradient of a maximum goes to the
    chosen token, among equals the first. A document whose tokens are all masked scores -inf, so that it never outranks a
    real one; a query whose tokens are all masked scores 0 with all others; both without gradient. What masked tokens hold,
    NaN too, has no effect.

    Args:
        q: queries [Nq, Lq, D], float16, bfloat16, float32 or float64; any strides.
        d: documents [Nd, Ld, D], each scored against each query; or [Nq, K, Ld, D], K candidates of each query.
        q_mask: bool [Nq, Lq], True for tokens that count; None: all.
        d_mask: bool [Nd, Ld], or [Nq, K, Ld] beside candidates.
        pooling: instead of the maximum: `TopMeanPooling(k)`, `SoftmaxPooling`, `LogSumExpPooling` or `AttentionPooling`.
        aggregate: "sum" over the query's tokens, or "mean" over those that count.
        normalize: divide every token by its length first (at least 1e-12), in float32.
        q_weights: [Nq, Lq], factors of the query tokens' terms, above 0, differentiable: the weighted token-wise
            interaction of DRL (arXiv:2203.07111). They multiply the tokens, so they want a maximum, or the mean of several.
        precision, memory_budget: as in `similarity_reduce`; the budget bounds what is kept from the forward to the
            backward (4 bytes for each query token and document), which otherwise is computed twice.

    Returns:
        [Nq, Nd], or [Nq, K] for candidates; float32 (float64 for float64 tokens), differentiable in q, d and q_weights.

    Raises:
        ValueError, TypeError: shapes, dtypes, masks or devices that do not fit, or options out of their range.

    Example:
        scores = maxsim(query_tokens, page_tokens, query_mask, page_mask)
        best = scores.topk(10).indices
    """
    candidates = _candidates(q, d)
    documents = d if not candidates else d.flatten(0, 1)
    if d_mask is not None:
        check_mask(d_mask, d, "d")
        d_mask = d_mask.flatten(0, 1) if candidates else d_mask
    q = _weighted(unit(q, q_mask, "q") if normalize else q, q_weights, q_mask, pooling)
    x = padded_sets(q, q_mask, "q")
    y = padded_sets(unit(documents, d_mask, "d") if normalize else documents, d_mask, "d")
    (scores,) = token_scores(
        x, y, pooling=pooling, candidates=candidates, precision=precision, memory_budget=memory_budget
    )
    return aggregated(scores, x, aggregate)


def maxsim_pairs(
    q: Tensor,
    d: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    **options: object,
) -> Tensor:
    """Scores [B] of each query with the document at its own position: `maxsim` of q [B, Lq, D] and d [B, Ld, D].

    Args:
        q, d, q_mask, d_mask, options: as in `maxsim`.

    Raises:
        ValueError, TypeError: as `maxsim`; different numbers of queries and documents.
    """
    if q.dim() != 3 or d.dim() != 3 or q.shape[0] != d.shape[0]:
        raise ValueError(
            f"q {list(q.shape)} and d {list(d.shape)}: expected as many documents as queries, [B, Lq, D] and [B, Ld, D]"
        )
    mask = None if d_mask is None else d_mask.unsqueeze(1)
    return maxsim(q, d.unsqueeze(1), q_mask, mask, **options).squeeze(1)  # type: ignore[arg-type]


def maxsim_varlen(
    q: Tensor,
    cu_seqlens_q: Tensor,
    d: Tensor,
    cu_seqlens_d: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_d: int | None = None,
    pooling: Pooling = _MAX,
    aggregate: str = "sum",
    normalize: bool = False,
    precision: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """As `maxsim`, of sets packed one behind the other: no padding is stored or multiplied.

    Args:
        q: all queries' tokens [Tq, D].
        cu_seqlens_q: int32 or int64 [Nq + 1], ascending from 0 to Tq: query i has the rows from entry i to entry i + 1.
        d: all documents' tokens [Td, D].
        cu_seqlens_d: [Nd + 1], the same for documents.
        max_seqlen_q, max_seqlen_d: the longest of each; when None they are read back, which on a GPU waits for it.
        pooling, aggregate, normalize, precision, memory_budget: as in `maxsim`.

    Returns:
        [Nq, Nd], float32 (float64 for float64 tokens).
    """
    x = packed_sets(unit(q) if normalize else q, cu_seqlens_q, max_seqlen_q, "q")
    y = packed_sets(unit(d) if normalize else d, cu_seqlens_d, max_seqlen_d, "d")
    (scores,) = token_scores(x, y, pooling=pooling, precision=precision, memory_budget=memory_budget)
    return aggregated(scores, x, aggregate)


def filip_similarity(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    pooling: Pooling = _MAX,
    aggregate: str = "mean",
    normalize: bool = False,
    precision: str | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Both token-wise similarities of FILIP (arXiv:2111.07783) from one sweep of the products.

        of x: mean_{p in x_i} max_{r in y_j} <x_ip, y_jr>        of y: mean_{r in y_j} max_{p in x_i} <x_ip, y_jr>

    The two are not each other's transpose. A set whose tokens are all masked is -inf where it is searched, 0 where its
    tokens search, and -inf where both are empty; without gradient.

    Args:
        x: [N, Lx, D], images' patches, say.
        y: [M, Ly, D], texts' tokens.
        x_mask, y_mask: bool [N, Lx] and [M, Ly], True for tokens that count; None: all.
        pooling, aggregate, normalize, precision, memory_budget: as in `maxsim`.

    Returns:
        (of x, of y), both [N, M] in float32 (float64 for float64 tokens).
    """
    sets_x = padded_sets(unit(x, x_mask, "x") if normalize else x, x_mask, "x")
    sets_y = padded_sets(unit(y, y_mask, "y") if normalize else y, y_mask, "y")
    of_x, of_y = token_scores(
        sets_x, sets_y, pooling=pooling, cols=True, names=("x", "y"), precision=precision, memory_budget=memory_budget
    )
    return aggregated(of_x, sets_x, aggregate), aggregated(of_y, sets_y, aggregate, dim=0)


def _candidates(q: Tensor, d: Tensor) -> int:
    """K if the documents are candidates of their queries, 0 if all documents are scored against all queries."""
    if not isinstance(d, Tensor) or d.dim() not in (3, 4):
        raise ValueError(f"d is {described(d)}: expected [Nd, Ld, D], or [Nq, K, Ld, D] for candidates of each query")
    if d.dim() == 3:
        return 0
    if d.shape[0] != q.shape[0]:
        raise ValueError(f"d {list(d.shape)} has candidates for {d.shape[0]} queries, but there are {q.shape[0]}")
    if d.shape[1] == 0:
        raise ValueError(f"d {list(d.shape)} has no candidates: expected at least one for each query")
    return d.shape[1]


def unit(tokens: Tensor, mask: Tensor | None = None, name: str = "tokens") -> Tensor:
    """Each token divided by its length; 0 for those that do not count."""
    tokens = _cleared(tokens, mask, name)
    # The length in float32: one rounding of 16-bit tokens, as a model's own normalisation has.
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(tokens.dtype)


def _cleared(tokens: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """0 for tokens that do not count: what they hold must not meet a gradient of 0, which is NaN where it is NaN."""
    if mask is None:
        return tokens
    check_mask(mask, tokens, name)
    return tokens.masked_fill(~mask.unsqueeze(-1), 0)


def _weighted(q: Tensor, weights: Tensor | None, mask: Tensor | None, pooling: Pooling) -> Tensor:
    if weights is None:
        return q
    if not isinstance(pooling, (MaxPooling, TopMeanPooling)):
        raise ValueError(
            f"q_weights with {pooling!r}: expected MaxPooling() or TopMeanPooling(k), which are homogeneous"
        )
    if weights.shape != q.shape[:2] or not weights.is_floating_point():
        raise ValueError(f"q_weights is {described(weights)}: expected a floating point tensor {list(q.shape[:2])}")
    return _cleared(q, mask, "q") * weights.unsqueeze(-1).to(q.dtype)


def aggregated(scores: Tensor, sets: TokenSets, aggregate: str, dim: int = 1) -> Tensor:
    """Sums over the tokens of the sets along `dim`, as they are or divided by how many count."""
    if aggregate == "sum":
        return scores
    if aggregate != "mean":
        raise ValueError(f'aggregate={aggregate!r}: expected "sum" or "mean"')
    return scores / sets.counts().clamp(min=1).to(scores.dtype).unsqueeze(dim)
