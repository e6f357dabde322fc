"""Forward: each program multiplies one tile of S, reduces it along both directions and stores what it found.

No tile is visited twice and no program waits for another: a row's (column's) partial results lie side by side, one for
each tile, until `merge_partials` joins them in a fixed order. There are no atomics, and the bits do not depend on the
order in which the tiles run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import LN2, finite, softplus2, wide
from .rules import along, excluding, negating
from .tiles import base2_scores, cosines, tile_of

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
    tensors,
    calm,
    row_partials,
    col_partials,
    panel,
    panel_rows,
    n,
    m,
    d,
    tiles_m,
    tiles_n,
    FIELDS: tl.constexpr,
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
    """Owns tile (i, j) of the panel of `panel_rows` rows that starts at row `panel`. Streams D. In registers: the tile.

    Stores, for each field and direction that wants it, (shift, sum) of every row of the tile to row_partials
    [slots, 2, tiles_n, panel_rows] and of every column to col_partials [slots, 2, tiles_m, M], where the sum is
    sum 2^(S - shift) for a log-sum-exp and sum softplus, without a shift, for the softplus.

    Two variants are launched, and one of them returns at once: where `calm` says that no score can overflow, the other
    one, which takes maxima and shifts, has nothing to do. The host need not know, and so need not wait. Without a
    log-sum-exp there is one variant, and no `calm`.
    """
    if calm is not None:
        if (tl.load(calm) != 0) != CALM:
            return
    i, j = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    row, col = panel + i * BM, j * BN
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    cos = cosines(x, y, x_strides, y_strides, row, col, n, m, d, BM, BN, BK, TMA, PRECISION, INTERPRETED)
    scores = base2_scores(cos, scale, bias, row_bias, col_bias, rows, cols, n, m, PER_ROW)
    tile = (row, col, rows, cols, n, m)
    local = i * BM + tl.arange(0, BM)
    row_size, col_size = wide(tiles_n) * panel_rows, wide(tiles_m) * m
    for f in tl.static_range(len(FIELDS)):
        # (kind, dim, weights, positive, exclude, row slot, column slot)
        to_row = row_partials + 2 * FIELDS[f][5] * row_size + wide(j) * panel_rows + local
        to_col = col_partials + 2 * FIELDS[f][6] * col_size + wide(i) * m + cols
        found = _reduced(scores, tile, numbers, tensors, FIELDS[f], CALM, BM, BN)
        row_shift, row_sum, col_shift, col_sum = found
        if FIELDS[f][5] >= 0:
            tl.store(to_row, row_shift, mask=local < panel_rows)
            tl.store(to_row + row_size, row_sum, mask=local < panel_rows)
        if FIELDS[f][6] >= 0:
            tl.store(to_col, col_shift, mask=cols < m)
            tl.store(to_col + col_size, col_sum, mask=cols < m)


@triton.jit
def _reduced(
    scores, tile, numbers, tensors, FIELD: tl.constexpr, CALM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """(shift, sum) of each row and of each column of the tile, for one field."""
    DIM: tl.constexpr = FIELD[1]
    WEIGHTS: tl.constexpr = FIELD[2]
    if FIELD[0] == 0:
        z = excluding(scores, float("-inf"), scores, tile, numbers, tensors, FIELD[4], DIM, BM, BN)
        if WEIGHTS >= 0:
            weight = along(tensors[WEIGHTS], tile, DIM)
            z = tl.where(weight == 0, float("-inf"), z + tl.log2(weight))
        return _log_sum_exp(z, CALM, FIELD[5] >= 0, FIELD[6] >= 0, BM, BN)
    else:
        terms = softplus2(negating(scores, scores, tile, numbers, tensors, FIELD[3], DIM, BM, BN))
        terms = excluding(terms, 0.0, scores, tile, numbers, tensors, FIELD[4], DIM, BM, BN)
        if WEIGHTS >= 0:
            weight = along(tensors[WEIGHTS], tile, DIM)
            terms = tl.where(weight == 0, 0.0, terms * weight)
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
    results,
    owners,
    tiles,
    KIND: tl.constexpr,
    CONTINUE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Owns BLOCK rows (columns) of one slot. Streams their partial results [2, tiles, owners], TILES at a time.

    `shifts` and `totals` [owners] become what the backward needs, and are read first where the panels above these tiles
    left theirs (CONTINUE). The shift of a log-sum-exp is brought near its logarithm, so that the total lies between 1 and
    a small multiple of the number of tiles: neither it nor its inverse leaves float32.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < owners
    shift, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if CONTINUE:
        total = tl.load(totals + at, mask=mask, other=0.0)
        if KIND == 0:
            shift = tl.where(total == 0, float("-inf"), tl.load(shifts + at, mask=mask, other=0.0))
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & mask[None, :]
        offsets = tile.to(tl.int64)[:, None] * owners + at[None, :]
        sums = tl.load(partials + wide(tiles) * owners + offsets, mask=inside, other=0.0)
        if KIND == 0:
            found = tl.load(partials + offsets, mask=inside, other=0.0)
            # An empty tile, and one that holds an infinity or NaN, says nothing about the size of the others.
            usual = (sums > 0) & (sums < float("inf"))
            size = tl.where(usual, found + tl.floor(tl.log2(tl.where(usual, sums, 1.0))), float("-inf"))
            new = tl.maximum(shift, tl.max(size, 0))
            held = finite(new)
            total = _rescaled(total, shift - held)
            total += tl.sum(_rescaled(sums, found - held[None, :]), 0)
            shift = new
        else:
            total += tl.sum(sums, 0)
    if KIND == 0:
        tl.store(shifts + at, finite(shift), mask=mask)
        value = finite(shift) + tl.log2(tl.where(total == 0, 1.0, total))
        tl.store(results + at, tl.where(total == 0, float("-inf"), value * LN2), mask=mask)
    else:
        tl.store(results + at, total * LN2, mask=mask)
    tl.store(totals + at, total, mask=mask)


@triton.jit
def _rescaled(sums, by):
    """sums 2^by; an infinity or NaN stays what it is, whatever `by` says of the others."""
    return tl.where((sums > 0) & (sums < float("inf")), sums * tl.exp2(by), sums)
