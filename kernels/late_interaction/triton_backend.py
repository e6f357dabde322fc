"""Late interaction on the Triton backend, without importing triton before it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Kernels, Request
from .pooling import MaxPooling
from .token_sets import TokenSets


def _forward(x: TokenSets, y: TokenSets, request: Request, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    from ..contrastive.triton_kernels import launching
    from .triton_soft import soft_launches
    from .triton_sweeps import max_launches, unfilled

    shape, device = (x.count, request.candidates or y.count), x.tokens.device
    scores = [launching.empty(*shape, dtype=torch.float32, device=device) for _ in range(request.outputs)]
    kept = unfilled(x, y, request) if keep else []
    with launching.on(device):
        launches = max_launches if isinstance(request.pooling, MaxPooling) else soft_launches
        launches(x, y, scores, kept, request)
    return scores, kept


def _backward(
    x: TokenSets,
    y: TokenSets,
    request: Request,
    kept: list[Tensor],
    grads: list[Tensor],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    from ..contrastive.triton_kernels import launching
    from .triton_max import max_gradients
    from .triton_panels import in_panels
    from .triton_soft import soft_gradients, soft_launches
    from .triton_sweeps import max_launches

    if not x.count or not y.count:
        dx, dy = (torch.zeros_like(each.tokens) if want else None for each, want in zip((x, y), wanted, strict=True))
        return dx, dy
    hard = isinstance(request.pooling, MaxPooling)
    gradients = max_gradients if hard else soft_gradients
    with launching.on(x.tokens.device):
        if not kept:
            return in_panels(x, y, request, grads, wanted, max_launches if hard else soft_launches, gradients)
        return gradients(x, y, request, kept, grads, wanted, x.tokens.dtype)


KERNELS = Kernels("triton", _forward, _backward)
