"""The CUDA kernels of csrc/cuda: ToMe's selection by a radix sort in one block, a merge and its sizes in one pass.

They take the place of the triton backend's on NVIDIA GPUs, where they can be built; similarities stay with Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_backend as triton_backend  # which makes the similarities
from .combine import COMBINATIONS, Combination
from .similarity import SIMILARITIES

#: Of a sample, what one block can sort: kMostSelectionTokens in csrc/cuda/token_selection.h.
MOST_TOKENS = 16384


def _select(
    best: Tensor, partner: Tensor, tokens: int, r: int, protected: int, class_token: bool, distill_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
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


SIMILARITIES["cuda"] = SIMILARITIES["triton"]._replace(select=_select, most_tokens=MOST_TOKENS)
COMBINATIONS["cuda"] = Combination(_combine, _spread, _average)
