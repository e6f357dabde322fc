"""The gradient of a maximum: sums of the rows that were chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .backends import Request, kept_bytes
from .token_sets import TokenSets
from .triton_gathers import gathered, lists_of
from .triton_sweeps import NOTHING, Directed, max_launches, unfilled


def max_gradients(
    x: TokenSets,
    y: TokenSets,
    request: Request,
    kept: list[Tensor],
    grads: list[Tensor],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """As `Kernels.backward`."""
    if kept:
        return _gradients(x, y, request, kept, grads, wanted, x.tokens.dtype)
    return _in_panels(x, y, request, grads, wanted)


def _gradients(
    x: TokenSets,
    y: TokenSets,
    request: Request,
    kept: list[Tensor],
    grads: list[Tensor],
    wanted: tuple[bool, bool],
    x_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    found = iter(Directed(grad, each[0]) for grad, each in zip(grads, kept, strict=True))
    rows, cols = (next(found) if asked else NOTHING for asked in (request.rows, request.cols))
    dx = _summed(x, y, rows, cols, request, True, x_dtype) if wanted[0] else None
    dy = _summed(y, x, cols, rows, request, False, y.tokens.dtype) if wanted[1] else None
    return dx, dy


def _summed(
    to: TokenSets, source: TokenSets, own: Directed, other: Directed, request: Request, to_x: bool, dtype: torch.dtype
) -> Tensor:
    """The gradient of one side, from what its own tokens have chosen and from who has chosen them."""
    lists = None
    if other.chosen is not None:
        lists = lists_of(other.chosen, source, to, request.candidates, to_x, request.budget)
    return gathered(to, source, own, other.scores, lists, request.candidates, to_x, dtype)


def _in_panels(
    x: TokenSets, y: TokenSets, request: Request, grads: list[Tensor], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """With positions found again for some sets of y at a time, as many as the budget has room for."""
    dx: Tensor | None = None
    of_panels: list[Tensor] = []
    panels = list(_panels(x, y, request))
    for panel, columns in panels:
        kept = unfilled(x, panel, request)
        scores = [torch.empty_like(each[:, columns], memory_format=torch.contiguous_format) for each in grads]
        max_launches(x, panel, scores, kept, request)
        part = [each[:, columns] for each in grads]
        dtype = x.tokens.dtype if len(panels) == 1 else torch.float32
        of_x, of_y = _gradients(x, panel, request, kept, part, wanted, dtype)
        if of_x is not None:
            dx = of_x if dx is None else dx.add_(of_x)
        if of_y is not None:
            of_panels.append(of_y)
    dy = torch.cat(of_panels) if of_panels else None
    return None if dx is None else dx.to(x.tokens.dtype), dy


def _panels(x: TokenSets, y: TokenSets, request: Request) -> Iterator[tuple[TokenSets, slice]]:
    """Sets of y that lie side by side, all of its rows among them, and their columns of the scores."""
    count = max(1, y.count * request.budget // max(1, kept_bytes(x, y, request)))
    if request.candidates or count >= y.count:
        yield y, slice(None)
        return
    # Where packed sets begin has to be known here, which waits for a GPU: this is the way of little memory.
    starts = None if y.padded is not None else [*y.starts.tolist(), y.tokens.shape[0]]
    for first in range(0, y.count, count):
        chosen = slice(first, min(first + count, y.count))
        begin, end = (each * (y.padded or 0) if starts is None else starts[each] for each in (first, chosen.stop))
        tokens, keep = y.tokens[begin:end], None if y.keep is None else y.keep[begin:end]
        starts_here = y.starts[chosen] - begin
        yield replace(y, tokens=tokens, starts=starts_here, lengths=y.lengths[chosen], keep=keep), chosen
