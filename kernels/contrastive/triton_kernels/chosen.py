"""The largest scores of a tile, as keys that sort by score and, among equal ones, by position."""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import wide

#: So many are picked out of a tile; of more, every score of the tile is kept for the host to choose from.
PICKED = 16

#: Below every score.
_LOWEST: tl.constexpr = tl.constexpr(-(2**31))
#: Above every index.
_BEYOND: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def sortable(scores):
    """int32, in the order of the scores: -0 is 0, and NaN comes after +inf."""
    scores = tl.where(scores == 0, 0.0, tl.where(scores == scores, scores, float("nan")))
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def keys_of(ranks, indices):
    """int64: the rank in the upper half; in the lower one what is larger for a lower index."""
    return (ranks.to(tl.int64) << 32) | (0xFFFFFFFF - indices.to(tl.int64))


@triton.jit
def store_rows(ranks, keys, tile, local, j, panel_rows, tiles_n, K: tl.constexpr, ALL: tl.constexpr):
    """To keys [panel_rows, tiles_n * K] the K largest of each row of the tile; ALL: to keys [panel_rows, M] all of them."""
    row, col, rows, cols, n, m = tile
    inside = local < panel_rows
    if ALL:
        at = keys + wide(local)[:, None] * m + cols[None, :]
        tl.store(
            at, keys_of(ranks, tl.broadcast_to(cols[None, :], ranks.shape)), mask=inside[:, None] & (cols < m)[None, :]
        )
    else:
        at = keys + wide(local) * (wide(tiles_n) * K) + j * K
        for rank in range(K):
            best = tl.max(ranks, 1)
            first = tl.min(tl.where(ranks == best[:, None], cols[None, :], _BEYOND), 1)
            tl.store(at + rank, keys_of(best, first), mask=inside)
            ranks = tl.where(cols[None, :] == first[:, None], _LOWEST, ranks)


@triton.jit
def store_cols(ranks, keys, tile, local, i, panel_rows, K: tl.constexpr, ALL: tl.constexpr):
    """To keys [tiles_m * K, M] the K largest of each column of the tile; ALL: to keys [panel_rows, M] all of them."""
    row, col, rows, cols, n, m = tile
    inside = cols < m
    if ALL:
        at = keys + wide(local)[:, None] * m + cols[None, :]
        tl.store(
            at,
            keys_of(ranks, tl.broadcast_to(rows[:, None], ranks.shape)),
            mask=(local < panel_rows)[:, None] & inside[None, :],
        )
    else:
        at = keys + wide(i) * K * m + cols
        for rank in range(K):
            best = tl.max(ranks, 0)
            first = tl.min(tl.where(ranks == best[None, :], rows[:, None], _BEYOND), 0)
            tl.store(at + wide(rank) * m, keys_of(best, first), mask=inside)
            ranks = tl.where(rows[:, None] == first[None, :], _LOWEST, ranks)
