"""Forward of the soft maxima: the sums of some sets' pooled similarities with one set, online."""

from __future__ import annotations

import triton
import triton.language as tl

from ...contrastive.triton_kernels.elementwise import LN2, finite, wide
from ...contrastive.triton_kernels.tiles import tile_of
from .pairs import pair_of, partners_of
from .sets import held_lanes, products, set_sums, streamed_lanes, whole_block


@triton.jit
def soft_sweep(
    held,
    streamed,
    scores,
    score_strides,
    kept,
    partners,
    candidates,
    groups,
    d,
    temperature,
    sharpness,
    PAIRS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SPAN: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Owns the pairs of BM // SPAN held sets, or of one longer set chunk by chunk, with one streamed set. Streams its tokens,
    BN at a time. In registers, for each held row: the maximum so far of S log2(e) / temperature = S sharpness, the sum of
    exponentials beside it and, of a softmax, the sum of these times S.

    Stores the scores at score_strides of (held set, streamed set), beside candidates pair by pair; and to `kept` [s,
    partners, rows], if given, the log-sum-exp in base 2 and, of a softmax, the pooled similarity. Rows that do not count
    get none.
    """
    program = tl.program_id(0)
    if PAIRS == 0:
        i, s = tile_of(program, groups, streamed.sets, GROUP)
        first = i * (BM // SPAN)
    else:
        first, s = pair_of(program, candidates, PAIRS)
    which = first + tl.arange(0, BM // SPAN)
    known = which < held.sets
    start, end = tl.load(streamed.starts + s), tl.load(streamed.ends + s).to(tl.int32)
    if PAIRS == 0:
        partner, pair = s, wide(which) * score_strides[0] + wide(s) * score_strides[1]
    else:
        partner, of_partner = partners_of(program, candidates, PAIRS)
        pair = wide(program) + tl.zeros((BM // SPAN,), tl.int32)
    stop = BM
    if SPAN == BM:
        stop = tl.load(held.ends + first).to(tl.int32)
    total = tl.zeros((BM // SPAN,), tl.float32)
    for chunk in range(0, stop, BM):
        lanes = held_lanes(held, first, chunk, SPAN, BM)
        rows, inside, counts = lanes
        whole = whole_block(held, lanes, d, WHOLE, EVEN, BM, BK)
        shift = tl.full((BM,), float("-inf"), tl.float32)
        mass, weighted = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
        for k in range(0, end, BN):
            others = streamed_lanes(streamed, start, end, k, BN)
            similarity = products(
                whole, held, lanes, streamed, start + k, others, d, WHOLE, EVEN, True, PRECISION, INTERPRETED, BM, BN, BK
            )  # fmt: skip
            exponent = tl.where(others[None, :], similarity * sharpness, float("-inf"))
            new = tl.maximum(shift, tl.max(exponent, 1))
            terms = tl.exp2(exponent - finite(new)[:, None])
            scale = tl.exp2(shift - finite(new))
            mass = mass * scale + tl.sum(terms, 1)
            if SOFTMAX:
                # Tokens that do not count have the weight 0, beside it S may be NaN.
                weighted = weighted * scale + tl.sum(tl.where(others[None, :], terms * similarity, 0.0), 1)
            shift = new
        mass = tl.where(mass == 0, 1.0, mass)  # of an empty set, whose score is another
        lse = finite(shift) + tl.log2(mass)
        pooled = lse * (LN2 * temperature)
        if SOFTMAX:
            pooled = weighted / mass
        total += set_sums(tl.where(counts, pooled, 0.0), SPAN, BM)
        if kept is not None:
            to = kept + wide(partner) * held.rows + rows
            tl.store(to, lse, mask=counts)
            if SOFTMAX:
                tl.store(to + wide(partners) * held.rows, pooled, mask=counts)
    tl.store(scores + pair, tl.where(end == 0, float("-inf"), total), mask=known)
