"""Backward of a maximum: each token's gradient is a weighted sum of some rows of the other side."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...contrastive.triton_kernels.elementwise import rounded, wide


class Weights(NamedTuple):
    """What each pair's rows are weighted with: values at owner * strides[0] + source set * strides[1]."""

    values: Any
    strides: tuple[int, ...]


class Lists(NamedTuple):
    """For each row those rows of the other side that have chosen it, as runs of one array.

    Attributes:
        entries: int32 [groups, source rows], the choosing rows, those of one chosen row side by side.
        bounds: int32 [groups, slots + 1], where in its group the run of each slot begins.
        span: slots of a set.
    """

    entries: Any
    bounds: Any
    span: int
    slots: int


@triton.jit
def gather_sum(
    out,
    owners,
    starts,
    sources,
    source_strides,
    source_starts,
    source_owners,
    source_rows,
    chosen,
    partners,
    chosen_weights,
    lists,
    list_weights,
    candidates,
    rows,
    d,
    PAIRS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLS: tl.constexpr,
):
    """Owns COLS columns of ROWS rows of `out` [rows, d]. Streams the rows it sums, ENTRIES for each at a time. In registers:
    as many partial sums, which are added at the end.

    A row's set is its owner, -1 for a row that does not count and gets 0. Summed are the rows that it has chosen itself,
    one of each partner set (`chosen` [partners, rows], in their set; None), and those that have chosen it (`lists`; None). A
    weight of 0 loads no row.

    PAIRS: as in `max_sweep`; 1: the sources are the candidates, 2: the owners are.
    """
    blocks = (rows + ROWS - 1) // ROWS
    program = tl.program_id(0)  # rows vary fastest: neighbours read neighbouring positions
    row = program % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    cols = program // blocks * COLS + tl.arange(0, COLS)
    owner = tl.load(owners + row, mask=row < rows, other=-1)
    total = tl.zeros((ROWS, ENTRIES, COLS), tl.float32)
    side = (sources, source_strides, cols, d)
    if chosen is not None:
        for j in range(0, partners, ENTRIES):
            partner = j + tl.arange(0, ENTRIES)[None, :]
            known = (partner < partners) & (owner >= 0)
            at = tl.load(chosen + wide(partner) * rows + row, mask=known, other=-1)
            known &= at >= 0
            set_of = partner
            if PAIRS == 1:
                set_of += owner * candidates
            if PAIRS == 2:
                set_of += owner // candidates
            source = tl.load(source_starts + set_of, mask=known, other=0) + at
            total += _weighted(chosen_weights, owner, set_of, source, known, side)
    if lists is not None:
        begin, end, group = _run(lists, starts, owner, row, candidates, PAIRS)
        for k in range(0, tl.max(end - begin), ENTRIES):
            entry = begin + k + tl.arange(0, ENTRIES)[None, :]
            known = entry < end
            source = tl.load(lists.entries + wide(group) * source_rows + entry, mask=known, other=0)
            set_of = tl.load(source_owners + source, mask=known, other=0)
            total += _weighted(list_weights, owner, set_of, source, known, side)
    found = rounded(tl.sum(total, 1), out.dtype.element_ty, INTERPRETED)
    tl.store(out + wide(row) * d + cols[None, :], found, mask=(row < rows) & (cols < d)[None, :])


@triton.jit
def _run(lists, starts, owner, row, candidates, PAIRS: tl.constexpr):
    """Where each row's run of entries begins and ends, and in which group."""
    known = owner >= 0
    group, slot = owner, row - tl.load(starts + owner, mask=known, other=0)
    if PAIRS == 1:
        group, slot = owner * 0, slot + wide(owner) * lists.span
    if PAIRS == 2:
        group, slot = owner % candidates, slot + wide(owner // candidates) * lists.span
    bounds = lists.bounds + wide(group) * (wide(lists.slots) + 1) + slot
    return tl.load(bounds, mask=known, other=0), tl.load(bounds + 1, mask=known, other=0), group


@triton.jit
def _weighted(weights, owner, set_of, source, known, side):
    """Each source row [rows, entries] times its weight, [rows, entries, columns]."""
    sources, strides, cols, d = side
    at = wide(owner) * weights.strides[0] + wide(set_of) * weights.strides[1]
    weight = tl.load(weights.values + at, mask=known, other=0.0)
    used = known & (weight != 0)
    offsets = wide(source)[:, :, None] * strides[0] + wide(cols)[None, None, :] * strides[1]
    loaded = tl.load(sources + offsets, mask=used[:, :, None] & (cols < d)[None, None, :], other=0.0)
    return weight[:, :, None] * loaded
