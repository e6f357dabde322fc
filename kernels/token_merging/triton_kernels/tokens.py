"""Tokens of a batch as the kernels see them, and the products of a tile of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...contrastive.triton_kernels.elementwise import wide
from ...contrastive.triton_kernels.tiles import load_block
from ...late_interaction.triton_kernels.sets import dot


class Tokens(NamedTuple):
    """One side of a launch.

    Attributes:
        tokens: [B, rows, D], with `strides`.
        scales: float32 [B, rows], what products with each row are multiplied by; None: 1.
        keep: uint8 [B, rows] with `keep_strides`, 0 for rows that do not count; None: all do.
    """

    tokens: Any
    strides: tuple[int, ...]
    scales: Any
    keep: Any
    keep_strides: tuple[int, ...]
    rows: int


@triton.jit
def rows_of(side, sample, row, d, BM: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr):
    """All of D of BM rows from `row` on, where BK holds it; else something that nobody looks at."""
    if WHOLE:
        return sample_block(side, sample, row, 0, d, BM, BK)
    else:
        return row


@triton.jit
def sample_block(side, sample, row, col, d, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] of a sample's tokens from (row, col) on, 0 beyond its last row and from column d on."""
    tokens = side.tokens + wide(sample) * side.strides[0]
    return load_block(tokens, (side.strides[1], side.strides[2]), row, col, side.rows, d, ROWS, COLS, False)


@triton.jit
def products(
    whole,
    held,
    streamed,
    sample,
    first,
    k,
    d,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """<held_i, streamed_j> of rows first:first+BM and k:k+BN, float32; 0 beyond the last rows.

    The bits are those of <j, i> where both sides are one: the products of two numbers commute, and every element of every
    tile adds them up over D in the one order of its instruction.
    """
    if WHOLE:
        total = dot(whole, tl.trans(sample_block(streamed, sample, k, 0, d, BN, BK)), None, PRECISION, INTERPRETED)
    else:
        total = tl.zeros((BM, BN), tl.float32)
        for col in range(0, d, BK):
            a = sample_block(held, sample, first, col, d, BM, BK)
            b = sample_block(streamed, sample, k, col, d, BN, BK)
            total = dot(a, tl.trans(b), total, PRECISION, INTERPRETED)
    return total


@triton.jit
def scales_of(side, sample, rows):
    """The factor of each row, 1 beyond the last one."""
    return tl.load(side.scales + wide(sample) * side.rows + rows, mask=rows < side.rows, other=1.0)


@triton.jit
def counted(side, sample, rows):
    """Which of the rows exist and count."""
    counts = rows < side.rows
    if side.keep is not None:
        at = side.keep + wide(sample) * side.keep_strides[0] + wide(rows) * side.keep_strides[1]
        counts = tl.load(at, mask=counts, other=0) != 0
    return counts
