"""Backward: each program multiplies one tile of S again and stores the weights of its pairs, G = d objective / dS.

The products that follow, dx = G y and dy = G^T x, read G from a buffer of bounded size. So a tile of S is computed once
for both of them, where a kernel that keeps dx or dy in registers computes it once for each: 6 N M D FLOPs in all instead
of 8, and no limit on D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import LN2, LOG2E, rounded, sigmoid2, softplus2, wide
from .rules import along, named, negating, touched
from .sources import above, exponents, pace, source, summed
from .tiles import cosines, scores_of, tile_of, with_teacher


@triton.jit
def weigh_tiles(
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
    row_shifts,
    col_shifts,
    row_means,
    col_means,
    row_factors,
    col_factors,
    one_exponential,
    row_scale,
    weights,
    weights_stride,
    row_sums,
    row_cosines,
    col_sums,
    values,
    panel_row,
    panel_col,
    panel_rows,
    panel_cols,
    n,
    m,
    d,
    tiles_m,
    tiles_n,
    STEPS: tl.constexpr,
    TEACHERS: tl.constexpr,
    PAIRS: tl.constexpr,
    ONE_EXPONENTIAL: tl.constexpr,
    PER_ROW: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Owns tile (i, j) of the panel of S at (panel_row, panel_col). Streams D, of each source in its turn.
    In registers: the cosines and the weights, and the tiles of the teachers whose fields are not done.

    Stores G, times `row_scale` if there is one, to weights [whole tiles of rows, of columns], in the dtype of the products; and,
    where asked for, in float32 and before any rounding, sum_j G to row_sums and sum_j G cos to row_cosines
    [tiles_n, panel_rows], sum_i G to col_sums [tiles_m, panel_cols], and the sum of the softplus terms to `values`
    [tiles_n, panel_rows].

    With f and s a row's factor and shift, a log-sum-exp contributes f 2^(S - s) to its row's weights, and the same in
    its column's terms; where no shift is large both come from one: 2^S (f 2^-s + f' 2^-s'). Whether that is so
    `one_exponential` says; as in `reduce_tiles` both variants are launched, and one returns at once.
    """
    if one_exponential is not None:
        if (tl.load(one_exponential) != 0) != ONE_EXPONENTIAL:
            return
    i, j = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    row, col = panel_row + i * BM, panel_col + j * BN
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    tile = (row, col, rows, cols, n, m)
    scores, taught = None, ()
    gradient = tl.zeros((BM, BN), tl.float32)
    value = tl.zeros((BM,), tl.float32)
    for s in tl.static_range(len(STEPS)):
        if STEPS[s][0] < 0:
            cos = cosines(x, y, x_strides, y_strides, row, col, n, m, d, BM, BN, BK, TMA, PRECISION, INTERPRETED)
            scores = scores_of(cos, scale, bias, row_bias, col_bias, rows, cols, n, m, PER_ROW, LOG2E)
        else:
            taught = with_teacher(taught, teachers, tile, TEACHERS, STEPS[s][0], BM, BN, PRECISION, INTERPRETED)
        for f in tl.static_range(len(STEPS[s][1])):
            sources = (scores, taught, teachers, factors)
            owned = (row_shifts, col_shifts, row_means, col_means, row_factors, col_factors)
            if STEPS[s][1][f][0] == 0 or STEPS[s][1][f][0] == 3:
                gradient = _add_softmax(
                    gradient, sources, owned, tile, numbers, tensors, STEPS[s][1][f], TEACHERS, ONE_EXPONENTIAL, BM, BN
                )
            else:
                natural = None
                if STEPS[s][1][f][0] == 4:
                    natural = scores_of(cos, scale, bias, row_bias, col_bias, rows, cols, n, m, PER_ROW, 1.0)
                gradient, value = _add_slopes(
                    gradient, value, values, scores, natural, owned, tile, numbers, tensors, STEPS[s][1][f], BM, BN
                )
    for p in tl.static_range(len(PAIRS)):
        if touched(tile, numbers, PAIRS[p][0], BM, BN):
            own = named(scores, tile, numbers, tensors, PAIRS[p][0], 1) & (rows < n)[:, None] & (cols < m)[None, :]
            if PAIRS[p][1] >= 0:
                gradient += tl.where(own, along(row_factors[PAIRS[p][1]], tile, 0), 0.0)
            if PAIRS[p][2] >= 0:
                gradient += tl.where(own, along(col_factors[PAIRS[p][2]], tile, 1), 0.0)
    local_row, local_col = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    inside_rows, inside_cols = local_row < panel_rows, local_col < panel_cols
    of_rows = wide(j) * panel_rows + local_row
    if row_sums is not None:
        tl.store(row_sums + of_rows, tl.sum(gradient, 1), mask=inside_rows)
    if row_cosines is not None:
        tl.store(row_cosines + of_rows, tl.sum(gradient * cos, 1), mask=inside_rows)
    if values is not None:
        tl.store(values + of_rows, value, mask=inside_rows)
    if col_sums is not None:
        tl.store(col_sums + wide(i) * panel_cols + local_col, tl.sum(gradient, 0), mask=inside_cols)
    if weights is not None:
        if row_scale is not None:
            gradient *= along(row_scale, tile, 0)
        # A tile's own offsets fit into 32 bits, that of its first row may not.
        start = wide(i * BM) * weights_stride + j * BN
        at = weights + start + (tl.arange(0, BM)[:, None] * weights_stride + tl.arange(0, BN)[None, :])
        kept = rounded(gradient, weights.dtype.element_ty, INTERPRETED)
        # No mask: the buffer has room for whole tiles, and what lies beyond the panel is 0 or another panel's to write.
        tl.store(at, kept)


@triton.jit
def _add_softmax(
    gradient,
    sources,
    owned,
    tile,
    numbers,
    tensors,
    FIELD: tl.constexpr,
    TEACHERS: tl.constexpr,
    ONE_EXPONENTIAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """`gradient` with the weights of a log-sum-exp or a mean."""
    scores, taught, teachers, factors = sources
    row_shifts, col_shifts, row_means, col_means, row_factors, col_factors = owned
    z = exponents(scores, taught, teachers, factors, tile, numbers, tensors, FIELD, TEACHERS, BM, BN)
    if FIELD[0] == 3:
        a = source(scores, taught, teachers, tile, FIELD[7], TEACHERS, LOG2E)
        if FIELD[5] >= 0:
            gradient += _mean_weights(z, a, factors, tile, row_shifts, row_means, row_factors, FIELD, 1)
        if FIELD[6] >= 0:
            gradient += _mean_weights(z, a, factors, tile, col_shifts, col_means, col_factors, FIELD, 0)
    else:
        w = _softmax_weights(z, tile, row_shifts, col_shifts, row_factors, col_factors, FIELD, ONE_EXPONENTIAL)
        if FIELD[9] >= 0:
            w *= pace(scores, factors, FIELD[9])
        gradient += w
    return gradient


@triton.jit
def _add_slopes(
    gradient,
    value,
    values,
    scores,
    natural,
    owned,
    tile,
    numbers,
    tensors,
    FIELD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """`gradient` with the weights of a sum of softplus or hinge terms; and, if `values` are wanted, `value` with the terms'
    sums."""
    row_shifts, col_shifts, row_means, col_means, row_factors, col_factors = owned
    if FIELD[0] == 1:
        a = negating(scores, scores, tile, numbers, tensors, FIELD[3], FIELD[1], BM, BN)
        if values is not None:
            value += tl.sum(summed(softplus2(a), scores, tile, numbers, tensors, FIELD, BM, BN), 1) * LN2
        # d softplus(-z S) / dS = -z sigmoid(-z S)
        slope = negating(sigmoid2(a), scores, tile, numbers, tensors, FIELD[3], FIELD[1], BM, BN)
    else:
        slope = tl.where(above(natural, tile, tensors, FIELD) > 0, 1.0, 0.0)
    slope = summed(slope, scores, tile, numbers, tensors, FIELD, BM, BN)
    if FIELD[5] >= 0:
        gradient += slope * along(row_factors[FIELD[5]], tile, 0)
    if FIELD[6] >= 0:
        gradient += slope * along(col_factors[FIELD[6]], tile, 1)
    return gradient, value


@triton.jit
def _softmax_weights(
    z, tile, row_shifts, col_shifts, row_factors, col_factors, FIELD: tl.constexpr, ONE_EXPONENTIAL: tl.constexpr
):
    """factor 2^(z - shift) of each row, of each column, or the sum of both."""
    ROW: tl.constexpr = FIELD[5]
    COL: tl.constexpr = FIELD[6]
    if ROW >= 0:
        by_row, row_shift = along(row_factors[ROW], tile, 0), along(row_shifts[ROW], tile, 0)
    if COL >= 0:
        by_col, col_shift = along(col_factors[COL], tile, 1), along(col_shifts[COL], tile, 1)
    if ROW >= 0 and COL >= 0:
        if ONE_EXPONENTIAL:
            return tl.exp2(z) * (by_row * tl.exp2(-row_shift) + by_col * tl.exp2(-col_shift))
        else:
            return tl.exp2(z - row_shift) * by_row + tl.exp2(z - col_shift) * by_col
    elif ROW >= 0:
        return tl.exp2(z - row_shift) * by_row
    else:
        return tl.exp2(z - col_shift) * by_col


@triton.jit
def _mean_weights(z, a, factors, tile, shifts, means, owners_factors, FIELD: tl.constexpr, DIM: tl.constexpr):
    """factor p (d mean / dS) of a mean's pairs, in the direction of the rows (DIM 1) or of the columns.

    p = 2^(z - shift) / total, whose total is in the factor. A mean of S under a teacher grows by p, one of a teacher
    under S by p k (A - mean), and one of S under itself by both.
    """
    SLOT: tl.constexpr = FIELD[6 - DIM]
    factor, shift = along(owners_factors[SLOT], tile, 1 - DIM), along(shifts[SLOT], tile, 1 - DIM)
    p = tl.exp2(z - shift) * factor
    if FIELD[8] < 0:
        growth = (a - along(means[SLOT], tile, 1 - DIM)) * LN2
        if FIELD[9] >= 0:
            growth *= factors[FIELD[9]]
        p *= growth if FIELD[7] >= 0 else 1.0 + growth
    return p
