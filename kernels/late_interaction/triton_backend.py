"""Triton kernels of late interaction: the host side."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contrastive.triton_kernels import launching
from .backends import Kernels, Request
from .token_sets import TokenSets
from .triton_max import max_gradients
from .triton_sweeps import max_launches, unfilled


def _forward(x: TokenSets, y: TokenSets, request: Request, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    shape, device = (x.count, request.candidates or y.count), x.tokens.device
    scores = [launching.empty(*shape, dtype=torch.float32, device=device) for _ in range(request.outputs)]
    kept = unfilled(x, y, request) if keep else []
    with launching.on(device):
        max_launches(x, y, scores, kept, request)
    return scores, kept


def _backward(
    x: TokenSets,
    y: TokenSets,
    request: Request,
    kept: list[Tensor],
    grads: list[Tensor],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    if not x.count or not y.count:
        dx, dy = (torch.zeros_like(each.tokens) if want else None for each, want in zip((x, y), wanted, strict=True))
        return dx, dy
    with launching.on(x.tokens.device):
        return max_gradients(x, y, request, kept, grads, wanted)


KERNELS = Kernels("triton", _forward, _backward)
