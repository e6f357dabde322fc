"""Forward: each program multiplies one tile of S, reduces it along both directions and stores what it found.

No tile is visited twice and no program waits for another: a row's (column's) partial results lie side by side, one for
each tile, until `merge_partials` joins them in a fixed order. There are no atomics, and the bits do not depend on the
order in which the tiles run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chosen import sortable, store_cols, store_rows
from .elementwise import LN2, LOG2E, finite, softplus2, wide
from .rules import excluding, negating
from .sources import above, exponents, source, summed
from .tiles import cosines, scores_of, tile_of, with_teacher

#: How far, in base 2, a row's maximum may lie below its tile's before the row gets exponentials of its own. A term
#: that underflows beside the tile's maximum is then below 2^-46 of the row's largest one.
_FAR: tl.constexpr = tl.constexpr(80.0)


@triton.jit
def reduce_tiles(
    x,
    y,
    x_strides,
    y_strides,
    scale,
    bias,
    row_bias,
    col_bias,
    numbers,
    factors,
    tensors,
    teachers,
    calm,
    row_partials,
    col_partials,
    row_keys,
    col_keys,
    panel,
    panel_rows,
    n,
    m,
    d,
    tiles_m,
    tiles_n,
    STEPS: tl.constexpr,
    TEACHERS: tl.constexpr,
    PARTS: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    CALM: tl.constexpr,
    PER_ROW: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Owns tile (i, j) of the panel of `panel_rows` rows that starts at row `panel`. Streams D, of each source in its turn.
    In registers: the tile, and those of the teachers whose fields are not done.

    Stores, for each field and direction that wants it, (shift, sum) of every row of the tile to row_partials
    [slots, PARTS, tiles_n, panel_rows] and of every column to col_partials [slots, PARTS, tiles_m, M], where the sum is
    sum 2^(S - shift) for a log-sum-exp and, without a shift, the sum of its terms for any other; a mean has a third
    part, the sum weighted by A. The largest scores go to `row_keys` and `col_keys`, see `chosen.py`; ALL_KEYS: k above
    which all of them do.

    Two variants are launched, and one of them returns at once: where `calm` says that no score can overflow, the other
    one, which takes maxima and shifts, has nothing to do. The host need not know, and so need not wait. Without a
    log-sum-exp, and with one of anything but S, there is one variant, and no `calm`.
    """
    if calm is not None:
        if (tl.load(calm) != 0) != CALM:
            return
    i, j = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    row, col = panel + i * BM, j * BN
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    tile = (row, col, rows, cols, n, m)
    scores, taught = None, ()
    for s in tl.static_range(len(STEPS)):
        if STEPS[s][0] < 0:
            cos = cosines(x, y, x_strides, y_strides, row, col, n, m, d, BM, BN, BK, TMA, PRECISION, INTERPRETED)
            scores = scores_of(cos, scale, bias, row_bias, col_bias, rows, cols, n, m, PER_ROW, LOG2E)
        else:
            taught = with_teacher(taught, teachers, tile, TEACHERS, STEPS[s][0], BM, BN, PRECISION, INTERPRETED)
        for f in tl.static_range(len(STEPS[s][1])):
            value = None
            if STEPS[s][1][f][0] >= 4:
                # Compared in their own unit: scores that are equal there may differ in the last bit of base 2.
                if STEPS[s][1][f][7] < 0:
                    value = scores_of(cos, scale, bias, row_bias, col_bias, rows, cols, n, m, PER_ROW, 1.0)
                else:
                    value = source(scores, taught, teachers, tile, STEPS[s][1][f][7], TEACHERS, 1.0)
            if STEPS[s][1][f][0] == 6:
                keys = (row_keys, col_keys, i, j, panel_rows, tiles_n)
                _store_largest(value, keys, scores, tile, numbers, tensors, STEPS[s][1][f], ALL_KEYS, BM, BN)
            else:
                partials = (row_partials, col_partials, i, j, panel_rows, tiles_m, tiles_n)
                sources = (scores, taught, teachers, factors)
                _store_sums(
                    partials, value, sources, tile, numbers, tensors, STEPS[s][1][f], TEACHERS, PARTS, CALM, BM, BN
                )


@triton.jit
def _store_largest(
    value,
    to,
    scores,
    tile,
    numbers,
    tensors,
    FIELD: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The keys of the largest of `value`, for one field."""
    row_keys, col_keys, i, j, panel_rows, tiles_n = to
    local = i * BM + tl.arange(0, BM)
    value = excluding(value, float("-inf"), scores, tile, numbers, tensors, FIELD[4], FIELD[1], BM, BN)
    ranks = sortable(value)
    if FIELD[5] >= 0:
        store_rows(ranks, row_keys[FIELD[5]], tile, local, j, panel_rows, tiles_n, FIELD[9], FIELD[9] > ALL_KEYS)
    if FIELD[6] >= 0:
        store_cols(ranks, col_keys[FIELD[6]], tile, local, i, panel_rows, FIELD[9], FIELD[9] > ALL_KEYS)


@triton.jit
def _store_sums(
    to,
    value,
    sources,
    tile,
    numbers,
    tensors,
    FIELD: tl.constexpr,
    TEACHERS: tl.constexpr,
    PARTS: tl.constexpr,
    CALM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The partial sums of each row and of each column of the tile, for one field."""
    row_partials, col_partials, i, j, panel_rows, tiles_m, tiles_n = to
    local = i * BM + tl.arange(0, BM)
    row, col, rows, cols, n, m = tile
    row_size, col_size = wide(tiles_n) * panel_rows, wide(tiles_m) * m
    to_row = row_partials + PARTS * FIELD[5] * row_size + wide(j) * panel_rows + local
    to_col = col_partials + PARTS * FIELD[6] * col_size + wide(i) * m + cols
    if FIELD[0] == 3:
        found = _softmax_mean(sources, tile, numbers, tensors, FIELD, TEACHERS, BM, BN)
    else:
        found = _sums(value, sources, tile, numbers, tensors, FIELD, TEACHERS, CALM, BM, BN)
    # The parts of the rows, then as many of the columns.
    if FIELD[5] >= 0:
        for part in tl.static_range(len(found) // 2):
            tl.store(to_row + part * row_size, found[part], mask=local < panel_rows)
    if FIELD[6] >= 0:
        for part in tl.static_range(len(found) // 2):
            tl.store(to_col + part * col_size, found[len(found) // 2 + part], mask=cols < m)


@triton.jit
def _sums(
    value,
    sources,
    tile,
    numbers,
    tensors,
    FIELD: tl.constexpr,
    TEACHERS: tl.constexpr,
    CALM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """(shift, sum) of each row and of each column of the tile, for one field."""
    scores, taught, teachers, factors = sources
    KIND: tl.constexpr = FIELD[0]
    if KIND == 0:
        z = exponents(scores, taught, teachers, factors, tile, numbers, tensors, FIELD, TEACHERS, BM, BN)
        return _log_sum_exp(z, CALM, FIELD[5] >= 0, FIELD[6] >= 0, BM, BN)
    else:
        if KIND == 1:
            terms = softplus2(negating(scores, scores, tile, numbers, tensors, FIELD[3], FIELD[1], BM, BN))
        else:
            terms = above(value, tile, tensors, FIELD)
            if KIND == 4:
                terms = tl.where(terms < 0, 0.0, terms)  # NaN stays
            else:
                terms = tl.where(terms > 0, 1.0, 0.0)
        terms = summed(terms, scores, tile, numbers, tensors, FIELD, BM, BN)
        return tl.zeros((BM,), tl.float32), tl.sum(terms, 1), tl.zeros((BN,), tl.float32), tl.sum(terms, 0)


@triton.jit
def _log_sum_exp(z, CALM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(shift, sum 2^(z - shift)) of each row and of each column, all from one exponential per pair.

    Unless CALM the tile's maximum is everybody's shift. Where some row or column lies far below it, everybody's own
    maximum is, which takes the exponentials again, one direction at a time.
    """
    row_shift, col_shift = tl.zeros((BM,), tl.float32), tl.zeros((BN,), tl.float32)
    if CALM:
        terms = tl.exp2(z)
        row_sum, col_sum = tl.sum(terms, 1), tl.sum(terms, 0)
    else:
        row_max, col_max = tl.max(z, 1), tl.max(z, 0)
        peak = finite(tl.max(row_max, 0))
        if _far(row_max, peak, ROWS) | _far(col_max, peak, COLS):
            row_shift, col_shift = finite(row_max), finite(col_max)
            row_sum = tl.sum(tl.exp2(z - row_shift[:, None]), 1)
            col_sum = tl.sum(tl.exp2(z - col_shift[None, :]), 0)
        else:
            row_shift, col_shift = row_shift + peak, col_shift + peak
            terms = tl.exp2(z - peak)
            row_sum, col_sum = tl.sum(terms, 1), tl.sum(terms, 0)
    return row_shift, row_sum, col_shift, col_sum


@triton.jit
def _softmax_mean(
    sources,
    tile,
    numbers,
    tensors,
    FIELD: tl.constexpr,
    TEACHERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """(shift, sum 2^(z - shift), sum 2^(z - shift) A) of each row, then of each column; shifts as in `_log_sum_exp`."""
    scores, taught, teachers, factors = sources
    z = exponents(scores, taught, teachers, factors, tile, numbers, tensors, FIELD, TEACHERS, BM, BN)
    a = source(scores, taught, teachers, tile, FIELD[7], TEACHERS, LOG2E)
    row_max, col_max = tl.max(z, 1), tl.max(z, 0)
    peak = finite(tl.max(row_max, 0))
    row_shift, col_shift = tl.zeros((BM,), tl.float32), tl.zeros((BN,), tl.float32)
    if _far(row_max, peak, FIELD[5] >= 0) | _far(col_max, peak, FIELD[6] >= 0):
        row_shift, col_shift = finite(row_max), finite(col_max)
        terms = tl.exp2(z - row_shift[:, None])
        row_sum, row_weighted = tl.sum(terms, 1), tl.sum(_weighted(terms, a), 1)
        terms = tl.exp2(z - col_shift[None, :])
        col_sum, col_weighted = tl.sum(terms, 0), tl.sum(_weighted(terms, a), 0)
    else:
        row_shift, col_shift = row_shift + peak, col_shift + peak
        terms = tl.exp2(z - peak)
        row_sum, col_sum = tl.sum(terms, 1), tl.sum(terms, 0)
        terms = _weighted(terms, a)
        row_weighted, col_weighted = tl.sum(terms, 1), tl.sum(terms, 0)
    return row_shift, row_sum, row_weighted, col_shift, col_sum, col_weighted


@triton.jit
def _weighted(terms, a):
    """terms a; a pair that does not count may hold anything."""
    return tl.where(terms == 0, 0.0, terms * a)


@triton.jit
def _far(maximum, peak, WANTED: tl.constexpr):
    """Whether some row's (column's) maximum is far from the tile's; False for a direction that nobody asked for."""
    if WANTED:
        far = (maximum != float("-inf")) & (tl.abs(maximum - peak) > _FAR)
        return tl.max(far.to(tl.int32), 0) != 0
    else:
        return tl.full((), 0, tl.int1)


@triton.jit
def merge_partials(
    partials,
    shifts,
    totals,
    means,
    results,
    owners,
    tiles,
    KIND: tl.constexpr,
    CONTINUE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Owns BLOCK rows (columns) of one slot. Streams their partial results [PARTS, tiles, owners], TILES at a time.

    `shifts`, `totals` and `means` (in base 2; None but for a mean) [owners] become what the backward needs, and are read
    first where the panels above these tiles left theirs (CONTINUE). The shift of a log-sum-exp is brought near its
    logarithm, so that the total lies between 1 and a small multiple of the number of tiles: neither it nor its inverse
    leaves float32.
    """
    SHIFTED: tl.constexpr = KIND == 0 or KIND == 3
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < owners
    shift, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if means is not None:
        weighted = tl.zeros((BLOCK,), tl.float32)
    if CONTINUE:
        total = tl.load(totals + at, mask=mask, other=0.0)
        if SHIFTED:
            shift = tl.where(total == 0, float("-inf"), tl.load(shifts + at, mask=mask, other=0.0))
        if means is not None:
            weighted = total * tl.load(means + at, mask=mask, other=0.0)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & mask[None, :]
        offsets = tile.to(tl.int64)[:, None] * owners + at[None, :]
        sums = tl.load(partials + wide(tiles) * owners + offsets, mask=inside, other=0.0)
        if SHIFTED:
            found = tl.load(partials + offsets, mask=inside, other=0.0)
            # An empty tile, and one that holds an infinity or NaN, says nothing about the size of the others.
            usual = (sums > 0) & (sums < float("inf"))
            size = tl.where(usual, found + tl.floor(tl.log2(tl.where(usual, sums, 1.0))), float("-inf"))
            new = tl.maximum(shift, tl.max(size, 0))
            held = finite(new)
            if means is not None:
                more = tl.load(partials + 2 * wide(tiles) * owners + offsets, mask=inside, other=0.0)
                weighted = _rescaled(weighted, total, shift - held)
                weighted += tl.sum(_rescaled(more, sums, found - held[None, :]), 0)
            total = _rescaled(total, total, shift - held)
            total += tl.sum(_rescaled(sums, sums, found - held[None, :]), 0)
            shift = new
        else:
            total += tl.sum(sums, 0)
    if SHIFTED:
        tl.store(shifts + at, finite(shift), mask=mask)
    if KIND == 0:
        value = finite(shift) + tl.log2(tl.where(total == 0, 1.0, total))
        tl.store(results + at, tl.where(total == 0, float("-inf"), value * LN2), mask=mask)
    elif KIND == 3:
        mean = tl.where(total == 0, 0.0, weighted / total)
        tl.store(means + at, mean, mask=mask)
        tl.store(results + at, mean * LN2, mask=mask)
    elif KIND == 1:
        tl.store(results + at, total * LN2, mask=mask)
    else:
        tl.store(results + at, total, mask=mask)
    tl.store(totals + at, total, mask=mask)


@triton.jit
def _rescaled(value, sums, by):
    """value 2^by, where it belongs to `sums` that are neither 0 nor infinite nor NaN: those stay, whatever `by` says."""
    return tl.where((sums > 0) & (sums < float("inf")), value * tl.exp2(by), value)
