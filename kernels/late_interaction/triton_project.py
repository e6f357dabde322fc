"""`project_max` on the `triton` backend: the maximum of sets that are single rows of the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import Request
from .pooling import MaxPooling
from .token_sets import TokenSets


def forward(hidden: TokenSets, weight: Tensor, budget: int, precision: str) -> tuple[Tensor, Tensor]:
    """As `Projection.forward`."""
    from ..contrastive.triton_kernels import launching
    from .triton_sweeps import max_launches

    shape: dict[str, Any] = {"device": weight.device}
    values = launching.empty(hidden.count, weight.shape[0], dtype=torch.float32, **shape)
    chosen = launching.empty(hidden.count, weight.shape[0], dtype=torch.int32, **shape)
    with launching.on(weight.device):
        max_launches(_columns(weight), hidden, [values.T], [chosen[None]], _request(budget, precision))
    return values, chosen


def backward(
    hidden: TokenSets, weight: Tensor, chosen: Tensor, grad: Tensor, budget: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As `Projection.backward`."""
    from ..contrastive.triton_kernels import launching
    from .triton_max import max_gradients

    if not chosen.numel():
        dhidden, dweight = (
            torch.zeros_like(each) if want else None for each, want in zip((hidden.tokens, weight), wanted)
        )
        return dhidden, dweight
    with launching.on(weight.device):
        dweight, dhidden = max_gradients(
            _columns(weight), hidden, _request(budget), [chosen[None]], [grad.T], (wanted[1], wanted[0]), weight.dtype
        )
    return dhidden, dweight


def _request(budget: int, precision: str = "ieee") -> Request:
    return Request(MaxPooling(), 0, True, False, budget, precision)


def _columns(weight: Tensor) -> TokenSets:
    """Each column of the projection, a row of the weight, as a set of its own."""
    starts = torch.arange(weight.shape[0], device=weight.device)
    return TokenSets(weight, starts, torch.ones_like(starts), None, 1, 1)
