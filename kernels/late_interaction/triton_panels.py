"""The backward where the forward has kept nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..contrastive.triton_kernels import launching
from .backends import Request, kept_bytes
from .token_sets import TokenSets
from .triton_sweeps import unfilled

#: Fills scores and what is kept of them: (x, y, scores, kept, request).
Launches = Callable[[TokenSets, TokenSets, list[Tensor], list[Tensor], Request], None]
#: As `Kernels.backward`, that of x in a dtype of its own.
Gradients = Callable[
    [TokenSets, TokenSets, Request, list[Tensor], list[Tensor], tuple[bool, bool], torch.dtype],
    tuple[Tensor | None, Tensor | None],
]


def in_panels(
    x: TokenSets,
    y: TokenSets,
    request: Request,
    grads: list[Tensor],
    wanted: tuple[bool, bool],
    launches: Launches,
    gradients: Gradients,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients from forwards of some sets of y at a time, as many as the budget has room for."""
    dx: Tensor | None = None
    of_panels: list[Tensor] = []
    panels = list(_panels(x, y, request))
    for panel, columns in panels:
        part = [each[:, columns] for each in grads]
        scores = [launching.empty(*each.shape, dtype=torch.float32, device=each.device) for each in part]
        kept = unfilled(x, panel, request)
        launches(x, panel, scores, kept, request)
        dtype = x.tokens.dtype if len(panels) == 1 else torch.float32
        of_x, of_y = gradients(x, panel, request, kept, part, wanted, dtype)
        if of_x is not None:
            dx = of_x if dx is None else dx.add_(of_x)
        if of_y is not None:
            of_panels.append(of_y)
    return None if dx is None else dx.to(x.tokens.dtype), torch.cat(of_panels) if of_panels else None


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
