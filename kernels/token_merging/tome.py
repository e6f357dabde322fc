"""Bipartite soft matching: Token Merging (ToMe, arXiv:2210.09461)."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_metric, check_number, normalized
from .matching import Matching, unchanged
from .merging import Merge, Unmerge
from .similarity import best_partners, bipartite, select_pairs


def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    class_token: bool = False,
    distill_token: bool = False,
    *,
    protected: int = 0,
) -> tuple[Merge, Unmerge]:
    """ToMe's matching: (merge, unmerge) that take r tokens away.

    Tokens at even positions (a) each find the most similar one at an odd position (b), by cosine; the r best of these pairs
    are merged. The new order is that of the paper's code: a's unmerged tokens (by falling similarity, or by position where
    there is a class token), then b; with a distillation token the two special tokens first. Among equal similarities the
    lowest position wins, everywhere, so that recomputation chooses the same.

    Args:
        metric: [B, N, C], what similarity is taken of (the mean of the heads' keys in the paper); no gradient.
        r: tokens to take away; at most half of those that are not protected.
        class_token: token 0 is never merged.
        distill_token: token 1 is never merged.
        protected: so many first tokens are never merged, and stay in front (registers; class tokens among them).

    Returns:
        (merge, unmerge), see `Merge` and `Unmerge`.

    Raises:
        ValueError, TypeError: a metric that is not [B, N, C] floating point, or an r below 0.
    """
    matching = bipartite_matching(metric, r, class_token, distill_token, protected=protected)
    return Merge(matching), Unmerge(matching)


@torch.no_grad()
def bipartite_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False, *, protected: int = 0
) -> Matching:
    """As `bipartite_soft_matching`: the indices themselves."""
    check_metric(metric)
    check_number("r", r)
    check_number("protected", protected)
    batch, tokens, _ = metric.shape
    special = len({*range(protected), *([0] if class_token else []), *([1] if distill_token else [])})
    r = min(r, (tokens - special) // 2)
    if r <= 0:
        return unchanged(batch, tokens, metric.device)
    if (found := bipartite(metric, r, protected, class_token, distill_token)) is not None:
        return Matching(*found)
    metric = normalized(metric)
    x_keep, y_keep = free_halves(metric, protected, class_token, distill_token)
    best, partner = best_partners(metric[:, ::2], metric[:, 1::2], x_keep=x_keep, y_keep=y_keep)
    return matched(best, partner, tokens, r, protected, class_token, distill_token)


def free_halves(
    metric: Tensor, protected: int, class_token: bool, distill_token: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens at even and which at odd positions may be merged, bool [B, about N / 2]; None: all of them."""
    batch, tokens, _ = metric.shape
    at = torch.arange(tokens, device=metric.device)
    free = at >= protected
    if class_token:
        free &= at != 0
    if distill_token:
        free &= at != 1
    free = free.expand(batch, -1)
    even, odd = protected > 0 or class_token, protected > 1 or distill_token
    return free[:, ::2] if even else None, free[:, 1::2] if odd else None


def matched(
    best: Tensor, partner: Tensor, tokens: int, r: int, protected: int, class_token: bool, distill_token: bool
) -> Matching:
    """The matching of the r best pairs, from what `best_partners` gives for the tokens at even positions."""
    found = select_pairs(best, partner, tokens, r, protected, class_token, distill_token)
    if found is not None:
        return Matching(*found)
    order = best.argsort(dim=1, descending=True, stable=True)
    sources, unmerged = order[:, :r], order[:, r:]
    if class_token or protected:
        unmerged = unmerged.sort(dim=1).values
    places = partner.gather(1, sources)
    return _ordered(2 * sources, 2 * unmerged, 2 * places + 1, tokens, max(protected, 2 if distill_token else 0))


def _ordered(sources: Tensor, unmerged: Tensor, destinations: Tensor, tokens: int, first: int) -> Matching:
    """The unmerged tokens of a and then all of b; `first` tokens in front are taken from them in turns."""
    batch, device = sources.shape[0], sources.device
    odd = torch.arange(1, tokens, 2, device=device).expand(batch, -1)
    of_a, of_b = (first + 1) // 2, first // 2
    # Where a's unmerged tokens keep their order, these are the first tokens themselves.
    front = torch.empty(batch, first, dtype=torch.int64, device=device)
    front[:, ::2], front[:, 1::2] = unmerged[:, :of_a], odd[:, :of_b]
    kept = torch.cat([front, unmerged[:, of_a:], odd[:, of_b:]], 1)
    place_of_b = torch.arange(tokens // 2, device=device) + unmerged.shape[1]
    if of_b:
        # b's first tokens stand in front; the others keep their distance to the end.
        place_of_b[:of_b] = 2 * torch.arange(of_b, device=device) + 1
    return Matching(kept, sources, place_of_b[(destinations - 1) // 2])


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> tuple[Merge, Unmerge]:
    """ToMe's matching into every k-th token: all others are merged into the most similar of these.

    Tokens behind the last whole group of k stay as they are, behind the others (the paper's code leaves them out).

    Args:
        metric: [B, N, C].
        k: at least 1; 1 merges nothing.
    """
    check_metric(metric)
    check_number("k", k, least=1)
    batch, tokens, _ = metric.shape
    groups = tokens // k
    if k == 1 or groups == 0:
        matching = unchanged(batch, tokens, metric.device)
        return Merge(matching), Unmerge(matching)
    at = torch.arange(groups * k, device=metric.device).view(groups, k)
    sources, destinations = at[:, :-1].flatten(), at[:, -1]
    wide = normalized(metric)
    _, places = best_partners(wide[:, sources], wide[:, destinations])
    rest = torch.arange(groups * k, tokens, device=metric.device)
    matching = Matching(torch.cat([destinations, rest]).expand(batch, -1), sources.expand(batch, -1), places)
    return Merge(matching), Unmerge(matching)


def random_bipartite_soft_matching(
    metric: Tensor, r: int, *, generator: torch.Generator | None = None
) -> tuple[Merge, Unmerge]:
    """ToMe's matching of r tokens drawn at random into the most similar of the others.

    Args:
        metric: [B, N, C].
        r: at most N - 1.
        generator: on the metric's device; None: the device's own, which checkpointing replays.
    """
    check_metric(metric)
    check_number("r", r)
    batch, tokens, _width = metric.shape
    r = min(r, tokens - 1)
    if r <= 0:
        matching = unchanged(batch, tokens, metric.device)
        return Merge(matching), Unmerge(matching)
    drawn = torch.rand(batch, tokens, generator=generator, device=metric.device).argsort(dim=1, stable=True)
    sources, kept = drawn[:, :r], drawn[:, r:]
    wide = normalized(metric)
    _, places = best_partners(taken(wide, sources), taken(wide, kept))
    matching = Matching(kept, sources, places)
    return Merge(matching), Unmerge(matching)


def taken(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C] at index [B, K], as [B, K, C]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
