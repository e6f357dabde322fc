"""Token merging on the Triton backend, without importing triton before it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import SMALLEST_NORM, normalized
from .combine import COMBINATIONS, Combination
from .similarity import SIMILARITIES, Partners, Similarities
from .tome import free_halves, matched


def _best_partners(
    x: Tensor, y: Tensor, x_keep: Tensor | None, y_keep: Tensor | None, partners: int, budget: int
) -> tuple[Tensor, Tensor]:
    from .triton_similarity import best_partners

    return best_partners(x, y, x_keep, y_keep, partners)


def _energies(x: Tensor, margin: float, alpha: float, budget: int) -> Tensor:
    from .triton_similarity import energies

    return energies(x, margin, alpha)


def _bipartite(
    metric: Tensor, r: int, protected: int, class_token: bool, distill_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of 16 bits are multiplied as they are, which the matrix instructions do without rounding, and the products are
    divided by the lengths; no float32 copy of the metric is made."""
    from .triton_similarity import best_partners

    scales: tuple[Tensor | None, Tensor | None] = None, None
    if metric.dtype == torch.float32:
        metric = normalized(metric)
    else:
        lengths = torch.linalg.vector_norm(metric, dim=-1, dtype=torch.float32)
        scale = lengths.clamp_min_(SMALLEST_NORM).reciprocal_()
        scales = scale[:, ::2], scale[:, 1::2]
    free = free_halves(metric, protected, class_token, distill_token)
    best, partner = best_partners(metric[:, ::2], metric[:, 1::2], *free, Partners.ALL, *scales)
    found = matched(best, partner, metric.shape[1], r, protected, class_token, distill_token)
    return found.kept, found.sources, found.places


def _combine(
    x: Tensor, kept: Tensor, sources: Tensor, places: Tensor, factors: Tensor | None, divisors: Tensor | None
) -> Tensor:
    from .triton_combine import combine

    return combine(x, kept, sources, places, factors, divisors)


def _spread(x: Tensor, place_of: Tensor, factors: Tensor | None, divisors: Tensor | None) -> Tensor:
    from .triton_combine import spread

    return spread(x, place_of, factors, divisors)


SIMILARITIES["triton"] = Similarities(_best_partners, _energies, _bipartite)
COMBINATIONS["triton"] = Combination(_combine, _spread)
