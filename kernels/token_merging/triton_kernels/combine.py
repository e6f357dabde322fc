"""Tokens to their new places, and back. Every row of a result has one owner, which gathers what goes there."""

from __future__ import annotations

import triton
import triton.language as tl

from ...contrastive.triton_kernels.elementwise import rounded, wide

#: Above every position.
_BEYOND: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def combine_rows(
    out,
    x,
    strides,
    kept,
    sources,
    places,
    factors,
    divisors,
    tokens,
    count,
    merged,
    width,
    blocks,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLS: tl.constexpr,
):
    """Owns COLS columns of ROWS places of a sample of `out` [B, count, width]. Streams the places of the tokens that are
    merged, ENTRIES at a time, for those that are its own. In registers: the sums.

    Which sources a place has is searched by each program anew: comparing some hundred numbers takes less than the
    launches of a sort, and they are found in the order in which they are given.
    """
    sample, place, cols = _block(count, width, blocks, ROWS, COLS)
    here = place < count
    inside = here[:, None] & (cols < width)[None, :]
    token = tl.load(kept + wide(sample) * count + place, mask=here, other=0)
    own, share = _weighted(x, strides, factors, tokens, sample, token, here, cols, width)
    factor = _number(factors, sample, tokens, token, here)
    total, arrived = share, tl.zeros((ROWS,), tl.int32)
    for k in range(0, merged, ENTRIES):
        entry = k + tl.arange(0, ENTRIES)
        to = tl.load(places + wide(sample) * merged + entry, mask=entry < merged, other=-1)
        mine = to[None, :] == place[:, None]
        found = tl.sum(mine.to(tl.int32), 1)
        arrived += found
        for _ in range(0, tl.max(found, 0)):
            at = tl.min(tl.where(mine, entry[None, :], _BEYOND), 1)
            known = at < _BEYOND
            source = tl.load(sources + wide(sample) * merged + at, mask=known, other=0)
            _, share = _weighted(x, strides, factors, tokens, sample, source, known, cols, width)
            total += share
            mine &= entry[None, :] != at[:, None]
    divisor = _number(divisors, sample, count, place, here)
    # A token that is its place's whole average is copied: what was not merged keeps its bits.
    whole = (arrived == 0) & (factor == divisor)
    if divisors is not None:
        total = tl.div_rn(total, tl.broadcast_to(divisor[:, None], (ROWS, COLS)))
    found = tl.where(whole[:, None], own, rounded(total, out.dtype.element_ty, INTERPRETED))
    tl.store(out + (wide(sample) * count + place)[:, None] * width + cols[None, :], found, mask=inside)


@triton.jit
def spread_rows(
    out,
    x,
    strides,
    place_of,
    factors,
    divisors,
    tokens,
    count,
    width,
    blocks,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Owns COLS columns of ROWS tokens of a sample of `out` [B, tokens, width], and fetches each from its place."""
    sample, token, cols = _block(tokens, width, blocks, ROWS, COLS)
    here = token < tokens
    place = tl.load(place_of + wide(sample) * tokens + token, mask=here, other=0)
    own = _rows(x, strides, sample, place, here, cols, width)
    factor, divisor = _number(factors, sample, tokens, token, here), _number(divisors, sample, count, place, here)
    total = own.to(tl.float32) * factor[:, None]
    if divisors is not None:
        total = tl.div_rn(total, tl.broadcast_to(divisor[:, None], (ROWS, COLS)))
    found = tl.where((factor == divisor)[:, None], own, rounded(total, out.dtype.element_ty, INTERPRETED))
    inside = here[:, None] & (cols < width)[None, :]
    tl.store(out + (wide(sample) * tokens + token)[:, None] * width + cols[None, :], found, mask=inside)


@triton.jit
def _block(rows, width, blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The sample, the rows and the columns of a program; columns vary fastest, so that neighbours share their indices."""
    chunks = (width + COLS - 1) // COLS
    program = tl.program_id(0)
    owner = program // chunks
    row = owner % blocks * ROWS + tl.arange(0, ROWS)
    return owner // blocks, row, program % chunks * COLS + tl.arange(0, COLS)


@triton.jit
def _rows(x, strides, sample, row, known, cols, width):
    """Rows of a sample, 0 for those that are not known."""
    at = x + wide(sample) * strides[0] + row[:, None] * strides[1] + wide(cols)[None, :] * strides[2]
    return tl.load(at, mask=known[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def _number(numbers, sample, length, row, known):
    """Those of some rows, of numbers [B, length]; 1 where there are none."""
    if numbers is None:
        return tl.full(row.shape, 1.0, tl.float32)
    else:
        return tl.load(numbers + wide(sample) * length + row, mask=known, other=1.0)


@triton.jit
def _weighted(x, strides, factors, tokens, sample, row, known, cols, width):
    """Rows as they are, and times their factors in float32."""
    own = _rows(x, strides, sample, row, known, cols, width)
    share = own.to(tl.float32)
    if factors is not None:
        share *= _number(factors, sample, tokens, row, known)[:, None]
    return own, share
