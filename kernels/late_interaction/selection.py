"""Which tokens of a set are kept, by their similarity with another modality."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..contrastive.arguments import described
from .maxsim import maxsim
from .token_sets import check_mask


def most_similar_tokens(
    tokens: Tensor,
    others: Tensor,
    share: float,
    mask: Tensor | None = None,
    others_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The share of each set's tokens that come closest to any token of another modality's batch.

    Token p counts as max_j max_{r in others_j} <p, r>, and ceil(share * n) of a set's n tokens are kept, in their order, among
    equals the first: what FILIP (arXiv:2111.07783, section 3.1) does with share=0.25 before tokens travel between ranks.

    Args:
        tokens: [N, L, D].
        others: [M, K, D], the batch that they are compared with.
        share: above 0, at most 1.
        mask, others_mask: bool [N, L] and [M, K], True for tokens that count; None: all.

    Returns:
        (tokens [N, ceil(share L), D], their mask, None where `mask` is), differentiable in `tokens`; the choice has no
        gradient. Where no token of `others` counts the first ones are kept.

    Raises:
        ValueError: a share out of its range, or shapes that do not fit.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r}: expected a number above 0, at most 1")
    if mask is not None:
        check_mask(mask, tokens, "tokens")
    if others_mask is not None:
        check_mask(others_mask, others, "others")
    n, length, width = tokens.shape
    with torch.no_grad():
        one = tokens.detach().reshape(n * length, 1, width)
        all_others = others.detach().reshape(1, -1, width)
        of_others = None if others_mask is None else others_mask.reshape(1, -1)
        best = maxsim(one, all_others, None, of_others).view(n, length)
    return _kept(tokens, best, _share_of(length, share), mask, share)


def top_tokens(
    tokens: Tensor, query: Tensor, k: int, mask: Tensor | None = None, *, largest: bool = True
) -> tuple[Tensor, Tensor]:
    """The k tokens of each set that are most similar to the set's own query vector: SyCoCa's attentive mask (arXiv:2401.02137).

    There the patches that the text names are those to reconstruct from it, and the others those to caption without
    (`largest=False`).

    Args:
        tokens: [B, L, D], patches.
        query: [B, D], the text of each.
        k: at least 1, at most L.
        mask: bool [B, L], True for tokens that count; None: all.
        largest: False: the k least similar ones.

    Returns:
        (indices int64 [B, k], ascending in each set, and bool [B, k]: False where a set has fewer than k tokens that
        count); no gradient. Among equals the first are taken.

    Raises:
        ValueError: k out of its range, or shapes that do not fit.
    """
    if not isinstance(query, Tensor) or query.shape != tokens.shape[::2]:
        raise ValueError(f"query is {described(query)}: expected {list(tokens.shape[::2])}, one vector for each set")
    if not 1 <= k <= tokens.shape[1]:
        raise ValueError(f"k={k}: expected 1 to {tokens.shape[1]}, the tokens of a set")
    if mask is not None:
        check_mask(mask, tokens, "tokens")
    wide = torch.promote_types(tokens.dtype, torch.float32)
    scores = (tokens.detach().to(wide) @ query.detach().to(wide).unsqueeze(2)).squeeze(2)
    return _first_k(scores if largest else -scores, k, mask)


def take_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """[B, k, D]: the tokens [B, L, D] at indices int64 [B, k] of their set, differentiable."""
    return tokens.take_along_dim(indices.unsqueeze(-1), 1)


def _share_of(length: int, share: float) -> int:
    # A share of 0.1 of 10 is 1, though 0.1 * 10 may be a little more.
    return min(length, math.ceil(share * length - 1e-9))


def _kept(tokens: Tensor, scores: Tensor, k: int, mask: Tensor | None, share: float) -> tuple[Tensor, Tensor | None]:
    if mask is None:
        indices, _ = _first_k(scores, k, None)
        return take_tokens(tokens, indices), None
    counts = (share * mask.sum(1).double() - 1e-9).ceil()
    indices, counted = _first_k(scores, k, mask, counts)
    return take_tokens(tokens, indices), counted


def _first_k(scores: Tensor, k: int, mask: Tensor | None, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Positions of the k largest, ascending, and whether they count: at most `limit` [B] in each row."""
    allowed = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    order = torch.sort(scores.masked_fill(~allowed, -torch.inf), dim=1, descending=True, stable=True).indices
    if mask is not None:
        # A token that counts comes before one that does not, also where its score is -inf.
        order = order.take_along_dim(torch.sort(~allowed.take_along_dim(order, 1), dim=1, stable=True).indices, 1)
    taken = order[:, :k]
    counted = allowed.take_along_dim(taken, 1)
    if limit is not None:
        counted = counted & (torch.arange(k, device=scores.device) < limit[:, None])
    taken, back = taken.sort(dim=1)
    return taken, counted.take_along_dim(back, 1)
