"""Pair rules inside a tile, which is (row, col, rows, cols, n, m): its first row and column, all of them, and S's size.

RULES is a constexpr tuple of (code, a, b), the codes of `plan.py`; `a` and `b` index the launch's `numbers` (offsets, ends of ranges) or its `tensors` (ids, targets, thresholds)."""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import LOG2E


@triton.jit
def touched(tile, numbers, RULES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a tile needs its mask: it reaches over an edge of S, or a rule may name one of its pairs.

    What lies off the diagonal, nearly every tile, is spared the two instructions per pair that a mask costs.
    """
    row, col, rows, cols, n, m = tile
    needed = (row + BM > n) | (col + BN > m)
    for k in tl.static_range(len(RULES)):
        if RULES[k][0] == 0:
            ahead = col - row - numbers[RULES[k][1]]
            needed = needed | ((ahead < BM) & (ahead > -BN))
        elif RULES[k][0] == 3:
            needed = needed | ((col < numbers[RULES[k][2]]) & (col + BN > numbers[RULES[k][1]]))
        else:
            needed = needed | True
    return needed


@triton.jit
def named(scores, tile, numbers, tensors, RULES: tl.constexpr, DIM: tl.constexpr):
    """bool, of the tile's shape: the pairs that at least one rule names. DIM: whose thresholds, rows' (1) or columns'."""
    found = tl.full((tile[2].shape[0], tile[3].shape[0]), 0, tl.int1)
    for k in tl.static_range(len(RULES)):
        found = found | _named_by(scores, tile, numbers, tensors, RULES[k], DIM)
    return found


@triton.jit
def _named_by(scores, tile, numbers, tensors, RULE: tl.constexpr, DIM: tl.constexpr):
    row, col, rows, cols, n, m = tile
    code: tl.constexpr = RULE[0]
    if code == 0:
        return rows[:, None] + numbers[RULE[1]] == cols[None, :]
    elif code == 1:
        return _ids(tensors[RULE[1]], rows, n)[:, None] == _ids(tensors[RULE[2]], cols, m)[None, :]
    elif code == 2:
        return _ids(tensors[RULE[1]], rows, n)[:, None] != _ids(tensors[RULE[2]], cols, m)[None, :]
    elif code == 3:
        inside = (cols >= numbers[RULE[1]]) & (cols < numbers[RULE[2]])
        return tl.broadcast_to(inside[None, :], (rows.shape[0], cols.shape[0]))
    elif code == 5:
        return _ids(tensors[RULE[1]], rows, n)[:, None] == cols[None, :]
    else:
        if code == 4:
            own = rows[:, None] + numbers[RULE[1]] == cols[None, :]
        else:
            own = _ids(tensors[RULE[1]], rows, n)[:, None] == cols[None, :]
        # The owners' own vector lies along the axis that is not reduced.
        return (scores > along(tensors[RULE[2]], tile, 1 - DIM) * LOG2E) & ~own


@triton.jit
def _ids(ids, at, end):
    return tl.load(ids + at, mask=at < end, other=-1)


@triton.jit
def excluding(
    value,
    fill,
    scores,
    tile,
    numbers,
    tensors,
    RULES: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """`value`, a tile like the scores, with `fill` at the pairs that RULES name and beyond the edges of S."""
    if touched(tile, numbers, RULES, BM, BN):
        row, col, rows, cols, n, m = tile
        out = named(scores, tile, numbers, tensors, RULES, DIM) | (rows >= n)[:, None] | (cols >= m)[None, :]
        value = tl.where(out, fill, value)
    return value


@triton.jit
def negating(
    value, scores, tile, numbers, tensors, RULES: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """`value`, a tile like the scores, negated at the pairs that RULES name. Of the scores: -z S, the softplus' argument."""
    if len(RULES) > 0:
        if touched(tile, numbers, RULES, BM, BN):
            value = tl.where(named(scores, tile, numbers, tensors, RULES, DIM), -value, value)
    return value


@triton.jit
def along(vector, tile, DIM: tl.constexpr):
    """A vector along the reduced axis: the tile's columns for a reduction of rows (DIM 1), else its rows."""
    row, col, rows, cols, n, m = tile
    if DIM == 1:
        return tl.load(vector + cols, mask=cols < m, other=0.0)[None, :]
    else:
        return tl.load(vector + rows, mask=rows < n, other=0.0)[:, None]
