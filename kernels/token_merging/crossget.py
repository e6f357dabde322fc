"""Complete-graph soft matching with a guide: Cross-Guided Ensemble of Tokens (CrossGET, arXiv:2305.17455)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contrastive.arguments import described
from .checks import check_metric, check_number, normalized, protected_mask
from .combine import combine
from .matching import Matching, unchanged
from .merging import Merge, Unmerge
from .similarity import Partners, best_partners
from .tome import taken


def complete_graph_soft_matching(
    metric: Tensor,
    r: int,
    importance: Tensor | None = None,
    *,
    protected: int | Tensor = 0,
) -> tuple[Merge, Unmerge]:
    """CrossGET's matching: (merge, unmerge) that take r tokens away; any token may be merged into any other.

    Tokens are ranked by their largest cosine with another. The priority of a token is its largest cosine with a token of
    lower rank, less its importance; the r of the highest priority are sources, each merged into the most similar token that
    is none. That only lower ranks count keeps two tokens from wanting each other. Tokens that stay keep their order. With an
    importance the average of a source and its destination is weighted by 2 softmax(their importances), beside their sizes.
    Among equals the lowest position wins.

    Args:
        metric: [B, N, C], what cosines are taken of; no gradient.
        r: tokens to take away; at most half of those that are not protected.
        importance: [B, N], the cosine of each token with the cross token in the paper; None: 0, and plain averages.
        protected: so many first tokens, or those of a bool mask [N] or [B, N], are neither sources nor destinations.

    Returns:
        (merge, unmerge); `merge_tokens` and `merge_wavg` take the weights into account, `merge(x, mode)` does not.

    Raises:
        ValueError, TypeError: a metric that is not [B, N, C] floating point, or other arguments that do not fit.
    """
    matching = complete_graph_matching(metric, r, importance, protected=protected)
    return Merge(matching), Unmerge(matching)


@torch.no_grad()
def complete_graph_matching(
    metric: Tensor,
    r: int,
    importance: Tensor | None = None,
    *,
    protected: int | Tensor = 0,
    protected_count: int | None = None,
) -> Matching:
    """As `complete_graph_soft_matching`: the indices and weights themselves.

    Args:
        protected_count: how many tokens of a sample a mask protects at most; None: they are counted, which waits for the
            device and breaks a compiled graph.
    """
    check_metric(metric)
    check_number("r", r)
    batch, tokens, _ = metric.shape
    if importance is not None and (importance.shape != (batch, tokens) or not importance.is_floating_point()):
        raise ValueError(f"importance is {described(importance)}: expected a floating point tensor {[batch, tokens]}")
    barred = protected_mask(protected, metric)
    if protected_count is None:
        # A mask may protect another number in each sample; what one of them allows holds for all.
        protected_count = protected if isinstance(protected, int) else int(barred.sum(1).max()) if batch else 0
    r = min(r, (tokens - protected_count) // 2)
    if r <= 0:
        return unchanged(batch, tokens, metric.device)
    free, metric = ~barred, normalized(metric)
    order = _priorities(metric, free, importance).argsort(dim=1, descending=True, stable=True)
    sources, kept = order[:, :r].sort(dim=1).values, order[:, r:].sort(dim=1).values
    _, places = best_partners(taken(metric, sources), taken(metric, kept), y_keep=free.gather(1, kept))
    weights = None if importance is None else _weights(importance, kept, sources, places)
    return Matching(kept, sources, places, weights)


def _priorities(metric: Tensor, free: Tensor, importance: Tensor | None) -> Tensor:
    largest, _ = best_partners(metric, metric, x_keep=free, y_keep=free, partners=Partners.OTHERS)
    ranked = largest.argsort(dim=1, descending=True, stable=True)
    sorted_metric, sorted_free = taken(metric, ranked), free.gather(1, ranked)
    below, _ = best_partners(
        sorted_metric, sorted_metric, x_keep=sorted_free, y_keep=sorted_free, partners=Partners.LATER
    )
    found = torch.empty_like(below).scatter_(1, ranked, below)
    return found if importance is None else found - importance.to(found.dtype)


def _weights(importance: Tensor, kept: Tensor, sources: Tensor, places: Tensor) -> Tensor:
    """[B, N]: 2 w_src of a source; of a destination 1 and 2 w_dst - 1 for each of its sources; 1 of all others."""
    importance = importance.to(torch.promote_types(importance.dtype, torch.float32))
    destinations = kept.gather(1, places)
    # 2 softmax of two numbers, of the first: 1 + tanh of half their difference.
    lean = torch.tanh((importance.gather(1, sources) - importance.gather(1, destinations)) / 2)
    # What leans away from a destination is added up in the order of its sources, whatever the device.
    leaning = torch.ones_like(importance).scatter(1, sources, -lean).unsqueeze(-1)
    remaining = combine(leaning, Matching(kept, sources, places), None, None).squeeze(-1)
    return torch.ones_like(importance).scatter(1, kept, remaining).scatter(1, sources, 1 + lean)
