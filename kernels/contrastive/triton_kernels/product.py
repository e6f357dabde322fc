"""Backward: the products of the weights G with the features, dx = G y and dy = G^T x, panel by panel."""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import rounded, wide
from .tiles import load_block, tile_of


@triton.jit
def add_product(
    weights,
    features,
    weights_strides,
    features_strides,
    total,
    out,
    factor,
    rows,
    depth,
    depth_end,
    width,
    feature_row,
    tiles_m,
    tiles_n,
    TRANSPOSED: tl.constexpr,
    CONTINUE: tl.constexpr,
    TMA_WEIGHTS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Owns block (i, j) of the gradient of one side. Streams a panel of G and its features. In registers: the block.

    Adds W @ features[feature_row:feature_row + depth], W = weights [rows, depth] or its transpose, to what the panels
    before left in total [rows, width] (float32; CONTINUE), and stores the sum there, or, if `out` [rows, width] is
    given, times `factor` in the dtype of `out`. Nobody else touches the block.
    """
    i, j = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    row, col = i * BM, j * BN
    # A block's own offsets fit into 32 bits, that of its first row may not.
    start = wide(row) * width + col
    at = tl.arange(0, BM)[:, None] * width + tl.arange(0, BN)[None, :]
    mask = (row + tl.arange(0, BM) < rows)[:, None] & (col + tl.arange(0, BN) < width)[None, :]
    if CONTINUE:
        block = tl.load(total + start + at, mask=mask, other=0.0)
    else:
        block = tl.zeros((BM, BN), tl.float32)
    for k in range(0, depth, BK):
        if TRANSPOSED:
            w = tl.trans(load_block(weights, weights_strides, k, row, depth, rows, BK, BM, TMA_WEIGHTS))
        else:
            w = load_block(weights, weights_strides, row, k, rows, depth, BM, BK, TMA_WEIGHTS)
        f = load_block(features, features_strides, feature_row + k, col, depth_end, width, BK, BN, TMA)
        if INTERPRETED:
            w, f = w.to(tl.float32), f.to(tl.float32)
        block = tl.dot(w, f, block, input_precision=PRECISION)
    if out is None:
        tl.store(total + start + at, block, mask=mask)
    else:
        block *= tl.load(factor)
        tl.store(out + start + at, rounded(block, out.dtype.element_ty, INTERPRETED), mask=mask)
