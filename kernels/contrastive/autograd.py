"""The autograd function that the backends written in Python share: a sweep forward, a sweep back, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .operands import Operands
from .plan import Plan, decode, encode, has_gradient, result_count
from .reductions import Served

_OPERANDS = len(Operands._fields)


class Settings(NamedTuple):
    """How to sweep: bytes of working memory, and how float32 features are multiplied ("ieee", "tf32", "tf32x3")."""

    budget: int
    precision: str = "ieee"


#: (operands, plan, settings) -> (results, what the backward needs to know of each reduction).
Forward = Callable[[Operands, Plan, Settings], tuple[list[Tensor], list[list[Tensor]]]]
#: (operands, plan, saved, upstream gradients, settings, which are needed) -> gradients of the operands. Results that
#: have no gradient (`plan.has_gradient`) have an upstream gradient too, which means nothing.
Backward = Callable[[Operands, Plan, list[Tensor], list[Tensor], Settings, list[bool]], list[Tensor | None]]


class Sweeps(NamedTuple):
    """A backend: its name and its two sweeps."""

    name: str
    forward: Forward
    backward: Backward


class _SimilarityReduce(torch.autograd.Function):
    """Takes the operands, the sweeps, the plan's numbers and factors, the settings, and the plan's tensors."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        operands = Operands(*arguments[:_OPERANDS])
        sweeps, numbers, factors, settings, *metadata = arguments[_OPERANDS:]
        plan = decode(numbers, factors, metadata)
        results, statistics = sweeps.forward(operands, plan, settings)
        # Saved like the operands, so that torch notices when one is written to before the backward.
        ctx.save_for_backward(*operands, *metadata, *(tensor for each in statistics for tensor in each))
        ctx.request = sweeps, numbers, factors, settings, len(metadata)
        ctx.mark_non_differentiable(*without_gradient(plan, results))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sweeps, numbers, factors, settings, count = ctx.request
        # Unpacked once: under activation checkpointing each access would ask for the forward again.
        saved = list(ctx.saved_tensors)
        operands, metadata, statistics = saved[:_OPERANDS], saved[_OPERANDS:][:count], saved[_OPERANDS + count :]
        needed = list(ctx.needs_input_grad[:_OPERANDS])
        plan = decode(numbers, factors, metadata)
        with torch.no_grad(), torch.autocast(operands[0].device.type, enabled=False):
            results = sweeps.backward(Operands(*operands), plan, statistics, list(grads), settings, needed)
        results = differentiated_once(sweeps.name, results, [*operands, *grads])
        return *results, None, None, None, None, *[None] * count


def without_gradient(plan: Plan, results: list[Tensor]) -> list[Tensor]:
    """Those of a plan's results that no gradient comes back from."""
    found: list[Tensor] = []
    remaining = iter(results)
    for _, reduction in plan:
        mine = [next(remaining) for _ in range(result_count(reduction))]
        found += [] if has_gradient(reduction) else mine
    return found


def differentiated_once(
    name: str, gradients: Sequence[Tensor | None], of: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """What a backward returns, which refuses to be differentiated with respect to `of`, all that it was computed from.

    Args:
        name: the backend, for the error.
        gradients: found without a graph.
        of: operands and upstream gradients.
    """
    if not torch.is_grad_enabled():
        return list(gradients)
    return list(_DifferentiatedOnce.apply(name, len(gradients), *gradients, *of))


class _DifferentiatedOnce(torch.autograd.Function):
    """Passes gradients through and refuses to be differentiated itself."""

    @staticmethod
    def forward(ctx: FunctionCtx, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name  # type: ignore[attr-defined]
        return tuple(None if tensor is None else tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"This operator, or a loss over it, cannot be differentiated twice on the {ctx.name} backend: take "  # type: ignore[attr-defined]
            'gradients without create_graph=True, or compute it under use_backend("reference")'
        )


def differentiable(
    sweeps: Sweeps,
    operands: Operands,
    rows: tuple[Served, ...],
    cols: tuple[Served, ...],
    settings: Settings,
) -> tuple[Tensor, ...]:
    """Row results, then column results, from the sweeps of a backend."""
    numbers, factors, metadata = encode(rows, cols)
    results: tuple[Tensor, ...] = _SimilarityReduce.apply(*operands, sweeps, numbers, factors, settings, *metadata)
    return results
