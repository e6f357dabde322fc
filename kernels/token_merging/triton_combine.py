"""The launches of a merge and of what undoes it: one each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..contrastive.triton_kernels import launching
from ..contrastive.triton_kernels.launching import cdiv
from .triton_configurations import row_tile, search_block
from .triton_kernels.combine import combine_rows, spread_rows


def combine(
    x: Tensor, kept: Tensor, sources: Tensor, places: Tensor, factors: Tensor | None, divisors: Tensor | None
) -> Tensor:
    """As `Combination.combine`."""
    arguments = {
        "kept": kept.contiguous(),
        "sources": sources.contiguous(),
        "places": places.contiguous(),
        "tokens": x.shape[1],
        "count": kept.shape[1],
        "merged": sources.shape[1],
        "ENTRIES": search_block(sources.shape[1]),
    }
    return _launched(combine_rows, x, kept.shape[1], factors, divisors, arguments)


def spread(x: Tensor, place_of: Tensor, factors: Tensor | None, divisors: Tensor | None) -> Tensor:
    """As `Combination.spread`."""
    arguments = {"place_of": place_of.contiguous(), "tokens": place_of.shape[1], "count": x.shape[1]}
    return _launched(spread_rows, x, place_of.shape[1], factors, divisors, arguments)


def _launched(
    kernel: Any, x: Tensor, rows: int, factors: Tensor | None, divisors: Tensor | None, arguments: dict[str, Any]
) -> Tensor:
    """The result, [B, rows, C]."""
    batch, _, width = x.shape
    x = x.resolve_neg()
    out = launching.empty(batch, rows, width, dtype=x.dtype, device=x.device)
    interpreted = launching.interpreting()
    lanes, cols = row_tile(width, interpreted)
    arguments |= {
        "out": out,
        "x": x,
        "strides": x.stride(),
        "factors": None if factors is None else factors.contiguous(),
        "divisors": None if divisors is None else divisors.contiguous(),
        "width": width,
        "blocks": cdiv(rows, lanes),
        "INTERPRETED": interpreted,
        "ROWS": lanes,
        "COLS": cols,
        "num_warps": 1,
    }
    if programs := batch * arguments["blocks"] * cdiv(width, cols):
        with launching.on(x.device):
            launching.run(kernel, (programs,), None, arguments)
    return out
