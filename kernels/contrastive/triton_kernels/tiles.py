"""One tile of S, or of a teacher's similarity: which one a program works on, its cosines, its scores."""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import wide


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (i, j) of a program: GROUP tile rows are walked column by column, so that neighbours in time share both
    their rows and their columns in L2."""
    per_group = GROUP * tiles_n
    first = (program // per_group) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def load_block(source, strides, row, col, row_end, col_end, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """Block [ROWS, COLS] of a matrix from (row, col) on; 0 from row_end or col_end on.

    With TMA `source` is a descriptor, whose matrix ends there; else it is a pointer with `strides`.
    """
    if TMA:
        block = source.load([row, col])
    else:
        rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
        # 64 bits for where the block starts; within it 32 will do, the host sees to that (`launching.near`).
        start = source + wide(row) * strides[0] + wide(col) * strides[1]
        inside = (row + rows < row_end)[:, None] & (col + cols < col_end)[None, :]
        block = tl.load(start + (rows[:, None] * strides[0] + cols[None, :] * strides[1]), mask=inside, other=0.0)
    return block


@triton.jit
def cosines(
    x,
    y,
    x_strides,
    y_strides,
    row,
    col,
    n,
    m,
    d,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """<x_i, y_j> of rows row:row+BM and columns col:col+BN, float32; 0 beyond the edges of S. D in chunks of BK."""
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, d, BK):
        a = load_block(x, x_strides, row, k, n, d, BM, BK, TMA)
        b = load_block(y, y_strides, col, k, m, d, BN, BK, TMA)
        if INTERPRETED:  # its product of bfloat16 is wrong
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def scores_of(cos, scale, bias, row_bias, col_bias, rows, cols, n, m, PER_ROW: tl.constexpr, UNIT: tl.constexpr):
    """S of a tile of cosines, times UNIT, log2(e) or 1. The scale takes the factor first: S itself is not rounded on the
    way."""
    if PER_ROW:
        scores = cos * (tl.load(scale + rows, mask=rows < n, other=0.0) * UNIT)[:, None]
    else:
        scores = cos * (tl.load(scale) * UNIT)
    if bias is not None:
        scores += tl.load(bias) * UNIT
    if row_bias is not None:
        scores += (tl.load(row_bias + rows, mask=rows < n, other=0.0) * UNIT)[:, None]
    if col_bias is not None:
        scores += (tl.load(col_bias + cols, mask=cols < m, other=0.0) * UNIT)[None, :]
    return scores


@triton.jit
def with_teacher(
    taught,
    teachers,
    tile,
    TEACHERS: tl.constexpr,
    AT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The tuple `taught` of the teachers' cosines with those of teacher AT behind it.

    A teacher is (x, y, strides of x, of y, scale, width), its constants (PER_ROW, TMA, BK).
    """
    row, col, rows, cols, n, m = tile
    x, y, x_strides, y_strides, scale, d = teachers[AT]
    TMA: tl.constexpr = TEACHERS[AT][1]
    BK: tl.constexpr = TEACHERS[AT][2]
    cos = cosines(x, y, x_strides, y_strides, row, col, n, m, d, BM, BN, BK, TMA, PRECISION, INTERPRETED)
    return taught + (cos,)  # noqa: RUF005 (Triton does not unpack)


@triton.jit
def taught_scores(cos, teacher, tile, TEACHER: tl.constexpr, UNIT: tl.constexpr):
    """As `scores_of`, of a teacher."""
    row, col, rows, cols, n, m = tile
    return scores_of(cos, teacher[4], None, None, None, rows, cols, n, m, TEACHER[0], UNIT)
