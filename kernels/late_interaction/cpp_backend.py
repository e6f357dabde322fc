"""The C++ kernels of csrc/cpu for late interaction."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import Kernels, Request, kept_bytes
from .token_sets import TokenSets


def _arrays(sets: TokenSets) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return sets.tokens, sets.starts, sets.lengths, sets.keep


def _forward(x: TokenSets, y: TokenSets, request: Request, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    found = torch.ops.pairtile.max_scores(
        *_arrays(x), *_arrays(y), request.candidates, request.rows, request.cols, request.budget, keep
    )
    return found[: request.outputs], found[request.outputs :]


def _backward(
    x: TokenSets,
    y: TokenSets,
    request: Request,
    kept: list[Tensor],
    grads: list[Tensor],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    # In float32: one block of sets adds to what those before it left.
    sums = [
        torch.zeros(sets.tokens.shape, dtype=torch.float32) if want else None
        for sets, want in zip((x, y), wanted, strict=True)
    ]
    if kept:
        _add_gradients(x, y, request, kept, grads, sums)
    else:
        for of_x, of_y in _blocks(x, y, request):
            (part_x, rows_x), (part_y, rows_y) = _narrowed(x, of_x), _narrowed(y, of_y)
            _, choices = _forward(part_x, part_y, request, True)
            part = [grad[of_x] if request.candidates else grad[:, of_y] for grad in grads]
            views = [None if each is None else each[rows] for each, rows in zip(sums, (rows_x, rows_y), strict=True)]
            _add_gradients(part_x, part_y, request, choices, part, views)
    dx, dy = (None if each is None else each.to(x.tokens.dtype) for each in sums)
    return dx, dy


def _add_gradients(
    x: TokenSets, y: TokenSets, request: Request, kept: list[Tensor], grads: list[Tensor], sums: list[Tensor | None]
) -> None:
    upstream: list[Tensor | None] = []
    given = iter(zip(grads, kept, strict=True))
    for asked in (request.rows, request.cols):
        upstream += next(given) if asked else (None, None)
    torch.ops.pairtile.max_scores_backward(*_arrays(x), *_arrays(y), request.candidates, *upstream, *sums)


def _blocks(x: TokenSets, y: TokenSets, request: Request) -> Iterator[tuple[slice, slice]]:
    """Sets whose choices fit in the budget: of y beside all of x, or of x with their own candidates."""
    count = x.count if request.candidates else y.count
    step = max(1, count * request.budget // max(1, kept_bytes(x, y, request)))
    for first in range(0, count, step):
        last = min(first + step, count)
        if request.candidates:
            yield slice(first, last), slice(first * request.candidates, last * request.candidates)
        else:
            yield slice(0, x.count), slice(first, last)


def _narrowed(sets: TokenSets, part: slice) -> tuple[TokenSets, slice]:
    """Some successive sets without the rows of the others, and the rows that they have."""
    starts, lengths = sets.starts[part], sets.lengths[part]
    if not len(starts):
        return TokenSets(sets.tokens[:0], starts, lengths, None, sets.longest, None), slice(0, 0)
    first, last = int(starts.min()), int((starts + lengths).max())
    keep = None if sets.keep is None else sets.keep[first:last]
    return TokenSets(sets.tokens[first:last], starts - first, lengths, keep, sets.longest, None), slice(first, last)


KERNELS = Kernels("cpp", _forward, _backward)
