"""Functions of one number, in base 2, for the kernels."""

from __future__ import annotations

import triton
import triton.language as tl

#: Scores times this are in base 2.
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
#: Logarithms to base 2 times this are natural.
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus2(a):
    """log2(1 + 2^a), to 2e-7 of itself however small it is.

    `lg2` of the special function unit is good to 2^-22 near 1 *absolutely*, which is nothing of a softplus of 1e-5. So
    log2(1 + u) = u P(u) on [0, 1], P of degree 8 with the least relative error (3e-8, and 1.6e-7 as float32 evaluates it).
    """
    u = tl.exp2(-tl.abs(a))
    p = 0.007549176923930645 * u - 0.04256704822182655
    p = p * u + 0.1128561794757843
    p = p * u - 0.19711896777153015
    p = p * u + 0.27564141154289246
    p = p * u - 0.35840848088264465
    p = p * u + 0.48069295287132263
    p = p * u - 0.7213401794433594
    p = p * u + 1.4426950216293335
    return tl.maximum(a, 0.0) + u * p


@triton.jit
def sigmoid2(a):
    """2^a / (1 + 2^a), the derivative of `softplus2`; no overflow at either end."""
    u = tl.exp2(-tl.abs(a))
    return tl.where(a < 0, u, 1.0) / (1.0 + u)


@triton.jit
def finite(shift):
    """0 in place of an infinite maximum: S - shift then is an infinity or a number, never NaN."""
    return tl.where(tl.abs(shift) < float("inf"), shift, 0.0)


@triton.jit
def rounded(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """value in `dtype`, rounded to nearest even.

    Triton's interpreter truncates a bfloat16 instead; there the 16 low bits are rounded away beforehand.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def wide(number):
    """A size as 64 bits, whether it came as a tensor or, being 1, as a constant."""
    return tl.zeros((), tl.int64) + number
