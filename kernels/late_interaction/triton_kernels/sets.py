"""Sets of tokens as the kernels see them: which rows a tile has, their features, products and maxima."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...contrastive.triton_kernels.elementwise import wide


class Side(NamedTuple):
    """One side of a launch, a `TokenSets` as pointers and sizes.

    Attributes:
        tokens: [rows, D], with `strides`.
        starts, lengths: int64 [sets].
        ends: int64 [sets], one more than the last token of a set that counts, 0 for an empty set.
        keep: uint8 [rows], or None.
    """

    tokens: Any
    strides: tuple[int, ...]
    starts: Any
    lengths: Any
    ends: Any
    keep: Any
    sets: int
    rows: int


@triton.jit
def held_lanes(side, first, chunk, SPAN: tl.constexpr, BM: tl.constexpr):
    """For each lane of a tile its row in the matrix of tokens, whether that lies in its set, and whether it counts.

    Lane l is token chunk + l % SPAN of set first + l // SPAN.
    """
    lane = tl.arange(0, BM)
    which, token = first + lane // SPAN, chunk + lane % SPAN
    known = which < side.sets
    row = tl.load(side.starts + which, mask=known, other=0) + token
    inside = token < tl.load(side.lengths + which, mask=known, other=0)
    counts = token < tl.load(side.ends + which, mask=known, other=0)
    if side.keep is not None:
        counts = tl.load(side.keep + row, mask=counts, other=0) != 0
    return row, inside, counts


@triton.jit
def streamed_lanes(side, start, end, k, BN: tl.constexpr):
    """Whether the tokens k, k + 1, ... count, of the set whose rows begin at `start`."""
    token = k + tl.arange(0, BN)
    counts = token < end
    if side.keep is not None:
        counts = tl.load(side.keep + start + token, mask=counts, other=0) != 0
    return counts


@triton.jit
def held_block(side, lanes, col, d, BM: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr):
    """Columns col, col + 1, ... of the lanes; 0 for those that do not count. EVEN: D ends with a block."""
    row, _, counts = lanes
    cols = col + tl.arange(0, COLS)
    at = side.tokens + row[:, None] * side.strides[0] + wide(col) * side.strides[1]
    at += tl.arange(0, COLS)[None, :] * side.strides[1]
    if EVEN:
        return tl.load(at, mask=counts[:, None], other=0.0)
    else:
        return tl.load(at, mask=counts[:, None] & (cols < d)[None, :], other=0.0)


@triton.jit
def streamed_block(
    side, row, counts, col, d, BN: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr
):
    """Columns col, col + 1, ... of rows row, row + 1, ...; 0 for those that do not count, which without MASKED all do."""
    cols = tl.arange(0, COLS)
    # 64 bits for where the block starts; within it 32 will do, the host sees to that (`launching.near`).
    at = side.tokens + wide(row) * side.strides[0] + wide(col) * side.strides[1]
    at += tl.arange(0, BN)[:, None] * side.strides[0] + cols[None, :] * side.strides[1]
    if MASKED and EVEN:
        return tl.load(at, mask=counts[:, None], other=0.0)
    elif MASKED:
        return tl.load(at, mask=counts[:, None] & (col + cols < d)[None, :], other=0.0)
    elif EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(col + cols < d)[None, :], other=0.0)


@triton.jit
def products(
    whole,
    held,
    lanes,
    streamed,
    row,
    counts,
    d,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Dot products of the held lanes with BN streamed rows, float32. WHOLE: `whole` has all of D, in BK columns."""
    if WHOLE:
        b = streamed_block(streamed, row, counts, 0, d, BN, BK, EVEN, MASKED)
        total = dot(whole, tl.trans(b), None, PRECISION, INTERPRETED)
    else:
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, d, BK):
            a = held_block(held, lanes, k, d, BM, BK, EVEN)
            b = streamed_block(streamed, row, counts, k, d, BN, BK, EVEN, MASKED)
            total = dot(a, tl.trans(b), total, PRECISION, INTERPRETED)
    return total


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """a b, added to `total` if there is one."""
    if INTERPRETED:  # its product of bfloat16 is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def larger(a, b):
    """The larger number; NaN if one of them is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(values, AXIS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The maximum along an axis; NaN where there is one."""
    if INTERPRETED:  # its reduction by any function is slow, that by tl.max passes over NaN
        odd = tl.max((values != values).to(tl.int32), AXIS) != 0
        return tl.where(odd, float("nan"), tl.max(values, AXIS))
    else:
        return tl.reduce(values, AXIS, larger)


@triton.jit
def set_sums(values, SPAN: tl.constexpr, BM: tl.constexpr):
    """The sum of each set's lanes, [BM // SPAN]."""
    return tl.sum(tl.reshape(values, (BM // SPAN, SPAN)), 1)
