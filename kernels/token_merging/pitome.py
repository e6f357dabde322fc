"""Energy-ordered matching: Spectrum-Preserving Token Merging (PiToMe, arXiv:2405.16148)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_metric, check_number, normalized
from .matching import Matching, unchanged
from .merging import Merge, Unmerge
from .similarity import best_partners, energies
from .tome import taken


def pitome_soft_matching(
    metric: Tensor,
    r: int,
    margin: float,
    *,
    alpha: float = 1.0,
    protected: int = 0,
) -> tuple[Merge, Unmerge]:
    """PiToMe's matching: (merge, unmerge) that take r tokens away, where tokens are many and alike.

    The energy of a token is the mean of f(cos(k_i, k_j)) over all tokens, f(s) = s - margin where that is not negative, else
    alpha (exp(s - margin) - 1). Of the 2r tokens of the highest energy, in its order, the first, third, ... are merged, each
    into the most similar of the second, fourth, ...; all others are protected. New order: the first `protected` tokens, the
    others that are not merged by falling energy, then the second, fourth, .... Among equal energies, and among equal
    similarities, the token of the lowest position, and the one of the highest energy, wins.

    Args:
        metric: [B, N, C], what cosines are taken of; no gradient.
        r: tokens to take away; at most half of those that are not protected.
        margin: of the layer, see `pitome_margin`.
        alpha: of the paper's f.
        protected: so many first tokens are never merged and not counted in energies (the class token, say).

    Returns:
        (merge, unmerge), see `Merge` and `Unmerge`.

    Raises:
        ValueError, TypeError: a metric that is not [B, N, C] floating point, or numbers out of their range.
    """
    matching = pitome_matching(metric, r, margin, alpha=alpha, protected=protected)
    return Merge(matching), Unmerge(matching)


@torch.no_grad()
def pitome_matching(metric: Tensor, r: int, margin: float, *, alpha: float = 1.0, protected: int = 0) -> Matching:
    """As `pitome_soft_matching`: the indices themselves."""
    check_metric(metric)
    check_number("r", r)
    check_number("protected", protected)
    for name, value in (("margin", margin), ("alpha", alpha)):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r}: expected a finite number")
    batch, tokens, _ = metric.shape
    r = min(r, (tokens - protected) // 2)
    if r <= 0:
        return unchanged(batch, tokens, metric.device)
    free = normalized(metric[:, protected:])
    order = energies(free, float(margin), float(alpha)).argsort(dim=1, descending=True, stable=True)
    sources, destinations, rest = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
    _, chosen = best_partners(taken(free, sources), taken(free, destinations))
    front = torch.arange(protected, device=metric.device).expand(batch, -1)
    kept = torch.cat([front, protected + rest, protected + destinations], 1)
    return Matching(kept, protected + sources, chosen + (kept.shape[1] - r))


def pitome_margin(layer: int, layers: int, *, first: float = 0.9) -> float:
    """The paper's margin of a layer, counted from 0: first - first * layer / layers, wide in early layers."""
    check_number("layers", layers, least=1)
    if not isinstance(layer, int) or not 0 <= layer < layers:
        raise ValueError(f"layer={layer!r} of {layers}: expected a number from 0 to {layers - 1}")
    return first - first * layer / layers
