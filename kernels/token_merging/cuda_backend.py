"""The CUDA kernels of csrc/cuda: ToMe's selection by a radix sort in one block, a merge and its sizes in one pass.

They take the place of the triton backend's on NVIDIA GPUs, where they can be built; similarities stay with Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import normalized
from .combine import COMBINATIONS, Combination
from .similarity import SIMILARITIES, TORCH, Similarities, best_partners

#: Of a sample, what one block can sort: kMostSelectionTokens in csrc/cuda/token_selection.h.
MOST_TOKENS = 16384


def _best_partners(
    x: Tensor, y: Tensor, x_keep: Tensor | None, y_keep: Tensor | None, partners: int, budget: int
) -> tuple[Tensor, Tensor]:
    return SIMILARITIES.get("triton", TORCH).best_partners(x, y, x_keep, y_keep, partners, budget)


def _energies(x: Tensor, margin: float, alpha: float, budget: int) -> Tensor:
    return SIMILARITIES.get("triton", TORCH).energies(x, margin, alpha, budget)


def _bipartite(
    metric: Tensor, r: int, protected: int, class_token: bool, distill_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = metric.shape[1]
    unit = normalized(metric)
    # The selection itself bars tokens at even positions.
    barred = max(protected // 2, int(distill_token))
    y_keep = None
    if barred:
        y_keep = (torch.arange(tokens // 2, device=metric.device) >= barred).expand(len(metric), -1)
    best, partner = best_partners(unit[:, ::2], unit[:, 1::2], y_keep=y_keep)
    kept, sources, places = torch.ops.pairtile.cuda_select_pairs(
        best, partner, tokens, r, protected, class_token, distill_token
    )
    return kept, sources, places


def _combine(
    x: Tensor, kept: Tensor, sources: Tensor, places: Tensor, factors: Tensor | None, divisors: Tensor | None
) -> Tensor:
    found: Tensor = torch.ops.pairtile.cuda_combine_tokens(x, kept, sources, places, factors, divisors)
    return found


def _spread(x: Tensor, place_of: Tensor, factors: Tensor | None, divisors: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.pairtile.cuda_spread_tokens(x, place_of, factors, divisors)
    return found


def _average(
    x: Tensor, kept: Tensor, sources: Tensor, places: Tensor, factors: Tensor | None, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens, totals = torch.ops.pairtile.cuda_average_tokens(x, kept, sources, places, factors, sizes)
    return tokens, totals


SIMILARITIES["cuda"] = Similarities(_best_partners, _energies, _bipartite, MOST_TOKENS)
COMBINATIONS["cuda"] = Combination(_combine, _spread, _average)
