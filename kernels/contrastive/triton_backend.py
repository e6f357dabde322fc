"""The Triton backend: what the kernels of `triton_kernels` serve, without importing triton before they are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import Settings, Sweeps, differentiated_once
from .operands import Operands
from .plan import Plan
from .reductions import Diagonal

_OPERANDS = len(Operands._fields)


def _forward(operands: Operands, plan: Plan, settings: Settings) -> tuple[list[Tensor], list[list[Tensor]]]:
    from .triton_forward import forward_results

    return forward_results(operands, plan, settings)


def _backward(
    operands: Operands, plan: Plan, saved: list[Tensor], grads: list[Tensor], settings: Settings, needed: list[bool]
) -> list[Tensor | None]:
    from .triton_backward import backward_results

    return backward_results(operands, plan, saved, grads, settings, needed)


SWEEPS = Sweeps("triton", _forward, _backward)


class _SigmoidSum(torch.autograd.Function):
    """Takes the operands, which pairs are positive, the weight and the settings; its forward finds the gradients, too."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        from .triton_backward import sigmoid_sum

        operands, (positive, weight, settings) = Operands(*arguments[:_OPERANDS]), arguments[_OPERANDS:]
        needed = list(ctx.needs_input_grad[:_OPERANDS])
        value, gradients = sigmoid_sum(operands, positive, weight, settings, needed)
        ctx.save_for_backward(*gradients, *operands)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked once: under activation checkpointing each access would ask for the forward again.
        saved = ctx.saved_tensors
        gradients, operands = saved[:_OPERANDS], saved[_OPERANDS:]
        with torch.no_grad():  # in float32: the upstream gradient of float16 training may be 2^16
            scaled = [
                None if each is None else (each.float() * grad).to(operand.dtype)
                for each, operand in zip(gradients, operands, strict=True)
            ]
        return *differentiated_once("triton", scaled, [*operands, grad]), None, None, None


def sigmoid_sum(operands: Operands, positive: Diagonal, weight: float, settings: Settings) -> Tensor:
    """weight * sum_ij softplus(-z_ij S_ij), its gradients found in the sweep of the forward."""
    total: Tensor = _SigmoidSum.apply(*operands, positive, weight, settings)
    return total
