"""The Triton backend: what the kernels of `triton_kernels` serve, without importing triton before they are asked for."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from .autograd import Settings, Sweeps
from .operands import Operands
from .plan import Plan


def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _forward(operands: Operands, plan: Plan, settings: Settings) -> tuple[list[Tensor], list[list[Tensor]]]:
    from .triton_sweep import forward_results

    return forward_results(operands, plan, settings)


def _backward(
    operands: Operands, plan: Plan, saved: list[Tensor], grads: list[Tensor], settings: Settings, needed: list[bool]
) -> list[Tensor | None]:
    from .triton_sweep import backward_results

    return backward_results(operands, plan, saved, grads, settings, needed)


SWEEPS = Sweeps("triton", _forward, _backward)
