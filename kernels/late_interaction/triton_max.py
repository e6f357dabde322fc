"""The gradient of a maximum: sums of the rows that were chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Request
from .token_sets import TokenSets
from .triton_gathers import gathered, lists_of
from .triton_sweeps import NOTHING, Directed


def max_gradients(
    x: TokenSets,
    y: TokenSets,
    request: Request,
    kept: list[Tensor],
    grads: list[Tensor],
    wanted: tuple[bool, bool],
    x_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """As `Kernels.backward`, that of x in `x_dtype`."""
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
