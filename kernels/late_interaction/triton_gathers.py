"""The launches of `gather_sum`, and the lists of who has chosen whom."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contrastive.triton_kernels import launching
from ..contrastive.triton_kernels.launching import cdiv
from .token_sets import TokenSets
from .triton_configurations import gather_tile
from .triton_kernels.gather_sum import Lists, Weights, gather_sum
from .triton_sweeps import Directed

# Bytes that a stable sort takes for each entry: the keys, their order in 64 bits, and as much again to work in.
_SORT = 32


def gathered(
    to: TokenSets,
    source: TokenSets,
    own: Directed,
    list_grad: Tensor | None,
    lists: Lists | None,
    candidates: int,
    to_x: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient [T, D] of one side's tokens in `dtype`, from the two kinds of sums that `gather_sum` knows.

    Args:
        to, source: the side whose gradient it is, and the other one.
        own: gradients of scores [N, M] or [N, candidates], and the positions [partners, T] that `to`'s tokens have chosen.
        list_grad: gradients of the scores of `source`'s tokens.
        lists: these tokens, by the row of `to` that they have chosen.
        to_x: whether `to` is x.
    """
    rows, width = to.tokens.shape
    out = launching.empty(rows, width, dtype=dtype, device=to.tokens.device)
    if not rows or not width:
        return out
    tokens = launching.near(source.tokens)
    lanes, entries, cols = gather_tile(width, launching.interpreting())
    arguments = {
        "out": out,
        "owners": owners_of(to),
        "starts": to.starts,
        "sources": tokens,
        "source_strides": tokens.stride(),
        "source_starts": source.starts,
        "source_owners": owners_of(source) if lists is not None else None,
        "source_rows": source.tokens.shape[0],
        "chosen": own.chosen,
        "partners": 0 if own.chosen is None else own.chosen.shape[0],
        "chosen_weights": _weights(own.scores, candidates, to_x),
        "lists": lists,
        "list_weights": _weights(list_grad, candidates, to_x),
        "candidates": candidates,
        "rows": rows,
        "d": width,
        "PAIRS": (1 if to_x else 2) if candidates else 0,
        "INTERPRETED": launching.interpreting(),
        "ROWS": lanes,
        "ENTRIES": entries,
        "COLS": cols,
        "num_warps": 1,
    }
    launching.run(gather_sum, (cdiv(rows, lanes) * cdiv(width, cols),), None, arguments)
    return out


def _weights(grad: Tensor | None, candidates: int, to_x: bool) -> Weights | None:
    if grad is None:
        return None
    if candidates:  # one value for each candidate
        return Weights(grad.contiguous(), (0, 1) if to_x else (1, 0))
    strides = grad.stride()
    return Weights(grad, strides if to_x else strides[::-1])


def owners_of(sets: TokenSets) -> Tensor:
    """int32 [T]: the set of each row, -1 for rows that do not count."""
    owners = sets.owners()
    counts = torch.arange(len(owners), device=owners.device) < (sets.starts + sets.lengths)[owners]
    if sets.keep is not None:
        counts &= sets.keep
    return owners.masked_fill(~counts, -1).to(torch.int32)


def lists_of(chosen: Tensor, source: TokenSets, to: TokenSets, candidates: int, to_x: bool, budget: int) -> Lists:
    """Who has chosen each row of `to`, from what `source`'s rows have chosen, [groups, source rows].

    Each group of positions is sorted by itself, and stably, so that the order of a sum is that of the rows. Groups are taken
    together as far as the budget goes.
    """
    groups, rows = chosen.shape
    span = max(1, to.longest)
    owners = owners_of(source)
    slots, base = span, None
    if candidates:
        sets = owners // candidates if to_x else owners
        slots, base = span * (to.count if to_x else to.count // candidates), sets.to(torch.int64) * span
    device = chosen.device
    entries = launching.empty(groups, rows, dtype=torch.int32, device=device)
    bounds = launching.empty(groups, slots + 1, dtype=torch.int32, device=device)
    step = max(1, budget // (_SORT * rows + 1))
    places = torch.arange(slots + 1, dtype=torch.int32 if base is None else torch.int64, device=device)
    for first in range(0, groups, step):
        part = slice(first, min(first + step, groups))
        keys = chosen[part] if base is None else chosen[part] + base
        # Rows that do not count have chosen nothing, whatever stands there.
        keys = keys.masked_fill((owners < 0) | (chosen[part] < 0), -1)
        found, order = keys.sort(dim=1, stable=True)
        entries[part] = order
        every = places.expand(found.shape[0], -1).contiguous()
        bounds[part] = torch.searchsorted(found, every, out_int32=True)
    return Lists(entries, bounds, span, slots)
