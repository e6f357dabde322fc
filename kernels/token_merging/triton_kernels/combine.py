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
    token = tl.load(kept + wide(sample) * count + place, mask=here, other=0)
    factor, divisor = _number(factors, sample, tokens, token, here), _number(divisors, sample, count, place, here)
    if divisors is not None:
        alone = _arrivals(places, sample, place, merged, ROWS, ENTRIES) == 0
        factor, divisor = _share(factor, divisor, alone)
    total = _rows(x, strides, sample, token, here, cols, width).to(tl.float32) * factor[:, None]
    for k in range(0, merged, ENTRIES):
        entry, mine = _mine(places, sample, place, k, merged, ENTRIES)
        for _ in range(0, tl.max(tl.sum(mine.to(tl.int32), 1), 0)):
            at = tl.min(tl.where(mine, entry[None, :], _BEYOND), 1)
            known = at < _BEYOND
            source = tl.load(sources + wide(sample) * merged + at, mask=known, other=0)
            factor = _number(factors, sample, tokens, source, known)
            total += _rows(x, strides, sample, source, known, cols, width).to(tl.float32) * factor[:, None]
            mine &= entry[None, :] != at[:, None]
    if divisors is not None:
        total = _over(total, divisor)
    to = out + (wide(sample) * count + place)[:, None] * width + cols[None, :]
    tl.store(to, rounded(total, out.dtype.element_ty, INTERPRETED), mask=here[:, None] & (cols < width)[None, :])


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
    factor, divisor = _number(factors, sample, tokens, token, here), _number(divisors, sample, count, place, here)
    factor, divisor = _share(factor, divisor, here)
    total = _rows(x, strides, sample, place, here, cols, width).to(tl.float32) * factor[:, None]
    if divisors is not None:
        total = _over(total, divisor)
    to = out + (wide(sample) * tokens + token)[:, None] * width + cols[None, :]
    tl.store(to, rounded(total, out.dtype.element_ty, INTERPRETED), mask=here[:, None] & (cols < width)[None, :])


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
def _share(factor, divisor, alone):
    """Factor and divisor, 1 where they are equal: x * 7 / 7 is not x, and what is not merged keeps its bits."""
    whole = alone & (factor == divisor)
    return tl.where(whole, 1.0, factor), tl.where(whole, 1.0, divisor)


@triton.jit
def _over(total, divisor):
    """Rows over their divisors, as a division rounds: the quotient of a reciprocal, and what it leaves over.

    The division itself has a slow path that is a call, before which registers are saved on the stack.
    """
    inverse = (1.0 / divisor)[:, None]
    quotient = total * inverse
    left = tl.fma(-quotient, tl.broadcast_to(divisor[:, None], total.shape), total)
    corrected = tl.fma(left, tl.broadcast_to(inverse, total.shape), quotient)
    return tl.where(tl.abs(quotient) < float("inf"), corrected, quotient)


@triton.jit
def _mine(places, sample, place, k, merged, ENTRIES: tl.constexpr):
    """The sources k, k + 1, ..., and which of them come to which place, [places, ENTRIES]."""
    entry = k + tl.arange(0, ENTRIES)
    to = tl.load(places + wide(sample) * merged + entry, mask=entry < merged, other=-1)
    return entry, to[None, :] == place[:, None]


@triton.jit
def _arrivals(places, sample, place, merged, ROWS: tl.constexpr, ENTRIES: tl.constexpr):
    """How many sources come to each place."""
    found = tl.zeros((ROWS, ENTRIES), tl.int32)
    for k in range(0, merged, ENTRIES):
        _, mine = _mine(places, sample, place, k, merged, ENTRIES)
        found += mine.to(tl.int32)
    return tl.sum(found, 1)
