"""The C++ kernels of csrc/cpu for token merging: no similarity is stored, a merge reads and writes each token once."""

from __future__ import annotations

import torch
from torch import Tensor

from .combine import COMBINATIONS, Combination
from .similarity import SIMILARITIES, Similarities


def _best_partners(
    x: Tensor, y: Tensor, x_keep: Tensor | None, y_keep: Tensor | None, partners: int, budget: int
) -> tuple[Tensor, Tensor]:
    best, index = torch.ops.pairtile.cpp_best_partners(x, y, x_keep, y_keep, partners)
    return best, index


def _energies(x: Tensor, margin: float, alpha: float, budget: int) -> Tensor:
    found: Tensor = torch.ops.pairtile.cpp_token_energies(x, margin, alpha)
    return found


def _bipartite(
    metric: Tensor, r: int, protected: int, class_token: bool, distill_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept, sources, places = torch.ops.pairtile.cpp_bipartite_matching(metric, r, protected, class_token, distill_token)
    return kept, sources, places


def _combine(
    x: Tensor, kept: Tensor, sources: Tensor, places: Tensor, factors: Tensor | None, divisors: Tensor | None
) -> Tensor:
    found: Tensor = torch.ops.pairtile.cpp_combine_tokens(x, kept, sources, places, factors, divisors)
    return found


def _spread(x: Tensor, place_of: Tensor, factors: Tensor | None, divisors: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.pairtile.cpp_spread_tokens(x, place_of, factors, divisors)
    return found


SIMILARITIES["cpp"] = Similarities(_best_partners, _energies, _bipartite)
COMBINATIONS["cpp"] = Combination(_combine, _spread)
