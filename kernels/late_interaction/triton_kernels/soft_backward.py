"""Backward of the soft maxima: each side's owner multiplies the tiles again, and their weights by the other side."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...contrastive.triton_kernels.elementwise import rounded, wide
from .pairs import partners_of
from .sets import dot, held_lanes, products, streamed_block, streamed_lanes, whole_block


class Pooled(NamedTuple):
    """Scores that are differentiated, of one direction.

    Attributes:
        grads: upstream gradients, at `strides` of (held set, streamed set), beside candidates pair by pair.
        kept: what `soft_sweep` kept, [s, partners, rows of the side whose tokens pool].
    """

    grads: Any
    strides: tuple[int, ...]
    kept: Any
    partners: int


@triton.jit
def soft_gradient(
    out,
    held,
    streamed,
    of_held,
    of_streamed,
    candidates,
    chunks,
    d,
    unit,
    sharpness,
    rate,
    PAIRS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Owns COLS columns of the gradients of BM tokens of one held set. Streams all sets that it was scored against, BN tokens
    at a time. In registers: a tile of S, of its weights, and the gradients.

    The weight of a pair is g softmax, of a pooled mean g softmax (1 + (S - pooled) / temperature), `rate` = 1 / temperature;
    for each direction that is asked for. It is rounded to the tokens' dtype before it multiplies. Upstream gradients are
    given in `unit` [], if that is given.
    """
    program = tl.program_id(0)
    chunk, rest = program % chunks, program // chunks
    i, col = rest % held.sets, rest // held.sets * COLS
    lanes = held_lanes(held, i, chunk * BM, BM, BM)
    rows, inside, counts = lanes
    whole = whole_block(held, lanes, d, WHOLE, EVEN, BM, BK)
    total = tl.zeros((BM, COLS), tl.float32)
    begin, stop = i * 0, streamed.sets
    if PAIRS == 1:
        begin = (wide(i) * candidates).to(tl.int32)
        stop = begin + candidates
    if PAIRS == 2:
        begin, stop = i // candidates, i // candidates + 1
    if tl.load(held.ends + i) <= chunk * BM:
        stop = begin
    for s in range(begin, stop):
        start, end = tl.load(streamed.starts + s), tl.load(streamed.ends + s).to(tl.int32)
        partner, of_partner = s, i
        if PAIRS == 1:
            partner, of_partner = partners_of(s, candidates, PAIRS)
        if PAIRS == 2:
            partner, of_partner = partners_of(i, candidates, PAIRS)
        if of_held is not None:
            held_grad = tl.load(of_held.grads + wide(i) * of_held.strides[0] + wide(s) * of_held.strides[1])
            at = of_held.kept + wide(partner) * held.rows + rows
            held_kept = _kept(at, of_held.partners, held.rows, counts, SOFTMAX)
        if of_streamed is not None:
            streamed_grad = tl.load(
                of_streamed.grads + wide(i) * of_streamed.strides[0] + wide(s) * of_streamed.strides[1]
            )
        for k in range(0, end, BN):
            others = streamed_lanes(streamed, start, end, k, BN)
            similarity = products(
                whole, held, lanes, streamed, start + k, others, d, WHOLE, EVEN, True, PRECISION, INTERPRETED, BM, BN, BK
            )  # fmt: skip
            weights = tl.zeros((BM, BN), tl.float32)
            if of_held is not None:
                lse, pooled = held_kept
                weights += held_grad * _weights(similarity, lse[:, None], pooled[:, None], sharpness, rate, SOFTMAX)
            if of_streamed is not None:
                of_block = of_streamed.kept + wide(of_partner) * streamed.rows + start + k + tl.arange(0, BN)
                lse, pooled = _kept(of_block, of_streamed.partners, streamed.rows, others, SOFTMAX)
                weights += streamed_grad * _weights(similarity, lse[None, :], pooled[None, :], sharpness, rate, SOFTMAX)
            weights = tl.where(counts[:, None] & others[None, :], weights, 0.0)
            features = streamed_block(streamed, start + k, others, col, d, BN, COLS, False, True)
            total = dot(rounded(weights, features.dtype, INTERPRETED), features, total, PRECISION, INTERPRETED)
    if unit is not None:
        total *= tl.load(unit)
    cols = col + tl.arange(0, COLS)
    at = out + wide(rows)[:, None] * d + cols[None, :]
    total = tl.where(counts[:, None], total, 0.0)
    tl.store(at, rounded(total, out.dtype.element_ty, INTERPRETED), mask=inside[:, None] & (cols < d)[None, :])


@triton.jit
def _kept(at, partners, rows, counts, SOFTMAX: tl.constexpr):
    lse = tl.load(at, mask=counts, other=0.0)
    pooled = lse
    if SOFTMAX:
        pooled = tl.load(at + wide(partners) * rows, mask=counts, other=0.0)
    return lse, pooled


@triton.jit
def _weights(similarity, lse, pooled, sharpness, rate, SOFTMAX: tl.constexpr):
    weights = tl.exp2(similarity * sharpness - lse)
    if SOFTMAX:
        weights *= 1.0 + (similarity - pooled) * rate
    return weights
