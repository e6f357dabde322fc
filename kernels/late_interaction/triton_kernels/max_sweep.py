"""Forward of a maximum: the scores of some sets beside one, in one direction or both, and where the maxima are."""

from __future__ import annotations

import triton
import triton.language as tl

from ...contrastive.triton_kernels.elementwise import wide
from ...contrastive.triton_kernels.tiles import tile_of
from .sets import held_block, held_lanes, larger, largest, products, set_sums, streamed_lanes

#: Above every position.
_BEYOND: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def max_sweep(
    held,
    streamed,
    held_scores,
    streamed_scores,
    score_strides,
    held_chosen,
    streamed_chosen,
    candidates,
    groups,
    batches,
    d,
    PAIRS: tl.constexpr,
    SPAN: tl.constexpr,
    SETS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Owns the pairs of BM // SPAN held sets with SETS streamed ones. Streams the tokens of these, BN at a time. In
    registers: for each held row and each of BN lanes the largest product so far, and the block that it was in.

    Stores, where they are given, held_scores (sums over held tokens of maxima over streamed ones) and streamed_scores (the
    reverse) at score_strides of (held set, streamed set); beside candidates pair by pair. The positions of the maxima go
    where `backends.empty_kept` says, -1 where there is none; nothing for streamed tokens that do not count.

    PAIRS: 0 for all of them; beside candidates one per program, 1 where the candidates are streamed, 2 where they are held.
    """
    program = tl.program_id(0)
    if PAIRS == 0:
        i, j = tile_of(program, groups, batches, GROUP)
        first, begin = i * (BM // SPAN), j * SETS
        stop = tl.minimum(begin + SETS, streamed.sets)
    else:
        first, begin = _candidates(program, candidates, PAIRS)
        stop = begin + 1
    which = first + tl.arange(0, BM // SPAN)
    known = which < held.sets
    lanes = held_lanes(held, first, 0, SPAN, BM)
    whole = _whole(held, lanes, d, WHOLE, EVEN, BM, BK)
    for s in range(begin, stop):
        end = tl.load(streamed.ends + s).to(tl.int32)
        partner, of_partner, pair = s, which, wide(which) * score_strides[0] + wide(s) * score_strides[1]
        if PAIRS > 0:
            partner, of_partner = _partners(program, candidates, PAIRS)
            pair = wide(program) + tl.zeros((BM // SPAN,), tl.int32)
            of_partner += tl.zeros((BM // SPAN,), tl.int32)
        best, at, others = _blocks(
            (whole, held, lanes, streamed, tl.load(streamed.starts + s), end, d),
            (streamed_chosen, of_partner, known),
            held_scores is not None,
            held_chosen is not None,
            streamed_scores is not None,
            SPAN,
            WHOLE,
            EVEN,
            PRECISION,
            INTERPRETED,
            BM,
            BN,
            BK,
        )
        if held_scores is not None:
            total = set_sums(tl.where(lanes[2], best, 0.0), SPAN, BM)
            tl.store(held_scores + pair, tl.where(end == 0, float("-inf"), total), mask=known)
        if held_chosen is not None:
            _store_chosen(held_chosen, held, lanes, at, partner)
        if streamed_scores is not None:
            empty = tl.load(held.ends + which, mask=known, other=0) == 0
            tl.store(streamed_scores + pair, tl.where(empty, float("-inf"), others), mask=known)


@triton.jit
def max_long(
    held,
    streamed,
    held_scores,
    score_strides,
    held_chosen,
    candidates,
    d,
    PAIRS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As `max_sweep`, of one held set that is longer than a tile, in chunks of BM tokens, beside one streamed set."""
    program = tl.program_id(0)
    if PAIRS == 0:
        i, s = tile_of(program, held.sets, streamed.sets, GROUP)
        partner, pair = s, wide(i) * score_strides[0] + wide(s) * score_strides[1]
    else:
        i, s = _candidates(program, candidates, PAIRS)
        partner, _ = _partners(program, candidates, PAIRS)
        pair = wide(program)
    start, end = tl.load(streamed.starts + s), tl.load(streamed.ends + s).to(tl.int32)
    # Where no position is stored, what lies behind the last token that counts need not be visited.
    length = tl.load((held.ends if held_chosen is None else held.lengths) + i).to(tl.int32)
    total = tl.zeros((1,), tl.float32)
    for chunk in range(0, length, BM):
        lanes = held_lanes(held, i, chunk, BM, BM)
        best, at, _ = _blocks(
            (_whole(held, lanes, d, WHOLE, EVEN, BM, BK), held, lanes, streamed, start, end, d),
            (None, None, None),
            True,
            held_chosen is not None,
            False,
            BM,
            WHOLE,
            EVEN,
            PRECISION,
            INTERPRETED,
            BM,
            BN,
            BK,
        )
        total += set_sums(tl.where(lanes[2], best, 0.0), BM, BM)
        if held_chosen is not None:
            _store_chosen(held_chosen, held, lanes, at, partner)
    tl.store(held_scores + pair + tl.arange(0, 1), tl.where(end == 0, float("-inf"), total))


@triton.jit
def _candidates(program, candidates, PAIRS: tl.constexpr):
    """The held and the streamed set of a program, one of which is candidate `program` of the other."""
    if PAIRS == 1:
        return program // candidates, program
    else:
        return program, program // candidates


@triton.jit
def _partners(program, candidates, PAIRS: tl.constexpr):
    """Where a pair's positions lie among those of its held rows, and among those of its streamed rows."""
    if PAIRS == 1:
        return program % candidates, program * 0
    else:
        return program * 0, program % candidates


@triton.jit
def _whole(held, lanes, d, WHOLE: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    if WHOLE:
        return held_block(held, lanes, 0, d, BM, BK, EVEN)
    else:
        return None


@triton.jit
def _store_chosen(chosen, held, lanes, at, partner):
    rows, inside, counts = lanes
    tl.store(chosen + wide(partner) * held.rows + rows, tl.where(counts, at, -1), mask=inside)


@triton.jit
def _blocks(
    pair,
    to,
    HELD: tl.constexpr,
    POSITIONS: tl.constexpr,
    STREAMED: tl.constexpr,
    SPAN: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Of one streamed set: for each held row the maximum and its position, and for each held set the sum of the streamed
    tokens' maxima.

    A held row's maximum is taken lane by lane, and across lanes but once for the set: one comparison and, for a position,
    one more and a selection are all that a product costs. The blocks of a lane come in order, and of equal lanes the
    lowest position is taken: the first of all equals.
    """
    end = pair[5]
    best = tl.full((BM, BN), float("-inf"), tl.float32)
    block = tl.zeros((BM, BN), tl.int32)
    others = tl.zeros((BM // SPAN,), tl.float32)
    # Without a mask all blocks but the last are full, and need no selection either.
    full = 0
    if pair[3].keep is None:
        full = end // BN * BN
        for k in range(0, full, BN):
            best, block, others = _block(
                pair, to, k, best, block, others, HELD, POSITIONS, STREAMED, False, SPAN, WHOLE, EVEN, PRECISION,
                INTERPRETED, BM, BN, BK,
            )  # fmt: skip
    for k in range(full, end, BN):
        best, block, others = _block(
            pair, to, k, best, block, others, HELD, POSITIONS, STREAMED, True, SPAN, WHOLE, EVEN, PRECISION,
            INTERPRETED, BM, BN, BK,
        )  # fmt: skip
    # Without use, both cost nothing.
    top = largest(best, 1, INTERPRETED)
    at = None
    if POSITIONS:
        token = block + tl.arange(0, BN)[None, :]
        at = _first(token, best, top[:, None], 1)
        at = tl.where(top == float("-inf"), -1, at)
    return top, at, others


@triton.jit
def _first(position, values, top, AXIS: tl.constexpr):
    """The lowest position of those whose value is the maximum, or NaN."""
    return tl.min(tl.where((values == top) | (values != values), position, _BEYOND), AXIS)


@triton.jit
def _block(
    pair,
    to,
    k,
    best,
    block,
    others,
    HELD: tl.constexpr,
    POSITIONS: tl.constexpr,
    STREAMED: tl.constexpr,
    MASKED: tl.constexpr,
    SPAN: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The streamed tokens k to k + BN."""
    whole, held, lanes, streamed, start, end, d = pair
    counts = streamed_lanes(streamed, start, end, k, BN)
    scores = products(
        whole, held, lanes, streamed, start + k, counts, d, WHOLE, EVEN, MASKED, PRECISION, INTERPRETED, BM, BN, BK
    )
    if HELD:
        seen = scores
        if MASKED:
            seen = tl.where(counts[None, :], scores, float("-inf"))
        if POSITIONS:
            # NaN leaves the block as it was: the position stays one within the set.
            block = tl.where(seen > best, k, block)
        best = larger(best, seen)
    if STREAMED:
        chosen, partner, known = to
        seen = tl.reshape(tl.where(lanes[2][:, None], scores, float("-inf")), (BM // SPAN, SPAN, BN))
        top = largest(seen, 1, INTERPRETED)
        others += tl.sum(tl.where(counts[None, :], top, 0.0), 1)
        if chosen is not None:
            at = _first(tl.arange(0, SPAN)[None, :, None], seen, top[:, None, :], 1)
            at = tl.where(top == float("-inf"), -1, at)
            rows = wide(partner)[:, None] * streamed.rows + (start + k + tl.arange(0, BN))[None, :]
            tl.store(chosen + rows, at, mask=known[:, None] & counts[None, :])
    return best, block, others
