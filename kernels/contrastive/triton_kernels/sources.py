"""What a field is made of: S or a teacher's similarity, a function of it, and what of it counts."""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import LOG2E
from .rules import along, excluding
from .tiles import taught_scores


@triton.jit
def source(scores, taught, teachers, tile, SOURCE: tl.constexpr, TEACHERS: tl.constexpr, UNIT: tl.constexpr):
    """`scores` (SOURCE -1), or those of the teacher of that number, whose cosines are in `taught`, times UNIT."""
    if SOURCE < 0:
        return scores
    else:
        return taught_scores(taught[SOURCE], teachers[SOURCE], tile, TEACHERS[SOURCE], UNIT)


@triton.jit
def exponents(
    scores,
    taught,
    teachers,
    factors,
    tile,
    numbers,
    tensors,
    FIELD: tl.constexpr,
    TEACHERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """What a log-sum-exp or a mean takes 2 to the power of: its scores plus log2 of the pairs' weights; -inf where a pair
    does not count."""
    DIM: tl.constexpr = FIELD[1]
    WEIGHTS: tl.constexpr = FIELD[2]
    if FIELD[0] == 0:
        z = source(scores, taught, teachers, tile, FIELD[7], TEACHERS, LOG2E)
        if FIELD[9] >= 0:
            z = pace(z, factors, FIELD[9]) * (z - factors[FIELD[9] + 3])
    else:
        z = source(scores, taught, teachers, tile, FIELD[8], TEACHERS, LOG2E)
        if FIELD[9] >= 0:
            z *= factors[FIELD[9]]
    z = excluding(z, float("-inf"), scores, tile, numbers, tensors, FIELD[4], DIM, BM, BN)
    if WEIGHTS >= 0:
        weight = along(tensors[WEIGHTS], tile, DIM)
        z = tl.where(weight == 0, float("-inf"), z + tl.log2(weight))
    return z


@triton.jit
def pace(scores, factors, AT: tl.constexpr):
    """gain relu(slope S + offset): how fast a paced score grows with S."""
    return factors[AT] * tl.maximum(factors[AT + 1] * scores + factors[AT + 2], 0.0)


@triton.jit
def above(value, tile, tensors, FIELD: tl.constexpr):
    """How far S, in its own unit, lies above the owner's threshold."""
    return value - along(tensors[FIELD[9]], tile, 1 - FIELD[1])


@triton.jit
def summed(terms, scores, tile, numbers, tensors, FIELD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Terms of a weighted sum: 0 where a pair does not count."""
    terms = excluding(terms, 0.0, scores, tile, numbers, tensors, FIELD[4], FIELD[1], BM, BN)
    if FIELD[2] >= 0:
        weight = along(tensors[FIELD[2]], tile, FIELD[1])
        terms = tl.where(weight == 0, 0.0, terms * weight)
    return terms
