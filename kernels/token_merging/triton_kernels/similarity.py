"""What matchings ask of the similarities of a sample's tokens: the best partner of each, and its energy."""

from __future__ import annotations

import triton
import triton.language as tl

from ...contrastive.triton_kernels.elementwise import wide
from ...late_interaction.triton_kernels.sets import larger, largest
from .tokens import counted, products, rows_of, scales_of

#: Above every position.
_BEYOND: tl.constexpr = tl.constexpr(2**31 - 1)
#: `similarity.Partners`.
_OTHERS: tl.constexpr = tl.constexpr(1)
_LATER: tl.constexpr = tl.constexpr(2)


@triton.jit
def partner_sweep(
    best,
    index,
    x,
    y,
    d,
    blocks,
    PARTNERS: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Owns BM rows of a sample of x. Streams the rows of y that these may choose, BN at a time. In registers: for each row and
    each of BN lanes the largest product so far, and the block that it was in.

    Stores the largest product of each row in `best` and where it is in `index`, [B, rows of x]: of equal ones the lowest,
    -inf and 0 where there is none or the row does not count. NaN counts as the largest.

    The blocks of a lane come in order, and of equal lanes the lowest position is taken: the first of all equals.
    """
    program = tl.program_id(0)
    sample, first = program // blocks, program % blocks * BM
    rows, lanes = first + tl.arange(0, BM), tl.arange(0, BN)
    whole = rows_of(x, sample, first, d, BM, BK, WHOLE)
    top = tl.full((BM, BN), float("-inf"), tl.float32)
    block = tl.zeros((BM, BN), tl.int32)
    begin = 0
    if PARTNERS == _LATER:
        begin = first // BN * BN
    for k in range(begin, y.rows, BN):
        cols = k + lanes
        scores = products(whole, x, y, sample, first, k, d, WHOLE, PRECISION, INTERPRETED, BM, BN, BK)
        if y.scales is not None:
            scores *= scales_of(y, sample, cols)[None, :]
        allowed = counted(y, sample, cols)[None, :]
        if PARTNERS == _OTHERS:
            allowed &= cols[None, :] != rows[:, None]
        if PARTNERS == _LATER:
            allowed &= cols[None, :] > rows[:, None]
        scores = tl.where(allowed, scores, float("-inf"))
        # Not below or equal: larger, or the first NaN.
        block = tl.where(~(scores <= top) & (top == top), k, block)
        top = larger(top, scores)
    found = largest(top, 1, INTERPRETED)
    reached = (top == found[:, None]) | (top != top)
    at = tl.min(tl.where(reached, block + lanes[None, :], _BEYOND), 1)
    if x.scales is not None:
        found *= scales_of(x, sample, rows)
    none = (found == float("-inf")) | (counted(x, sample, rows) == 0)
    to = wide(sample) * x.rows + rows
    tl.store(best + to, tl.where(none, float("-inf"), found), mask=rows < x.rows)
    tl.store(index + to, tl.where(none, 0, at).to(tl.int64), mask=rows < x.rows)


@triton.jit
def energy_sweep(
    energies,
    x,
    margin,
    alpha,
    d,
    blocks,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Owns BM rows of a sample of x. Streams all its rows, BN at a time. In registers: for each row and each of BN lanes the
    sum of f, see `Similarities.energies`, so far. Every row adds up in one order: equal tokens have equal energies.
    """
    program = tl.program_id(0)
    sample, first = program // blocks, program % blocks * BM
    rows, lanes = first + tl.arange(0, BM), tl.arange(0, BN)
    whole = rows_of(x, sample, first, d, BM, BK, WHOLE)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, x.rows, BN):
        above = products(whole, x, x, sample, first, k, d, WHOLE, PRECISION, INTERPRETED, BM, BN, BK) - margin
        gain = tl.where(above >= 0, above, alpha * expm1_of_negative(above))
        total += tl.where((k + lanes < x.rows)[None, :], gain, 0.0)
    mean = tl.div_rn(tl.sum(total, 1), tl.zeros((BM,), tl.float32) + x.rows)
    tl.store(energies + wide(sample) * x.rows + rows, mean, mask=rows < x.rows)


@triton.jit
def expm1_of_negative(v):
    """exp(v) - 1 for v <= 0 to the last bits, where exp(v) - 1 would cancel: 2^n expm1(rest) + (2^n - 1); anything for v > 0."""
    v = larger(v, -87.0)
    # Beside 1.5 * 2^23 a float32 has no fraction left: its lowest bits are those of n.
    shifted = v * 1.4426950408889634 + 12582912.0
    n = shifted - 12582912.0
    # ln 2 in two parts, of which the first has so few digits that n times it is exact.
    rest = v - n * 0.693145751953125 - n * 1.428606765330187e-06
    p = rest * (1 / 5040) + 1 / 720
    p = p * rest + 1 / 120
    p = p * rest + 1 / 24
    p = p * rest + 1 / 6
    p = p * rest + 0.5
    p = p * rest + 1.0
    power = ((shifted.to(tl.int32, bitcast=True) - (0x4B400000 - 127)) << 23).to(tl.float32, bitcast=True)
    return power * (p * rest) + (power - 1.0)
