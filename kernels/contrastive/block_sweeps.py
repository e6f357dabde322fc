"""A backend's two sweeps over one block of S, for callers that join blocks themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from . import partial, torch_backend, triton_backend
from .autograd import Settings
from .operands import Operands
from .plan import Plan, encode, result_count
from .reductions import Served
from .torch_reductions import STATISTICS

_SWEEPS = {sweeps.name: sweeps for sweeps in (torch_backend.SWEEPS, triton_backend.SWEEPS)}


def forward(backend: str, operands: Operands, plan: Plan, settings: Settings) -> list[partial.Partial]:
    """What each (dim, reduction) of the plan comes to over the block."""
    if backend == "cpp":
        numbers, factors, metadata = encode(*_by_direction(plan))
        found = torch.ops.pairtile.similarity_reduce_forward(
            *operands, numbers, factors, metadata, settings.budget, False
        )
        count = (len(found) - 1) // 2
        results, statistics = list(found[:count]), [list(each) for each in found[count:-1]]
    else:
        results, kept = _SWEEPS[backend].forward(operands, plan, settings)
        # One entry for each result, as the operator of `cpp` gives them.
        statistics = []
        for (_, reduction), each in zip(plan, kept, strict=True):
            statistics += [each, *[[] for _ in range(result_count(reduction) - 1)]]
    parts: list[partial.Partial] = []
    at = 0
    for _, reduction in plan:
        count = result_count(reduction)
        parts.append(partial.of_results(reduction, results[at : at + count], statistics[at]))
        at += count
    return parts


def backward(
    backend: str,
    operands: Operands,
    plan: Plan,
    known: list[partial.Partial],
    grads: list[list[Tensor]],
    settings: Settings,
    needed: list[bool],
) -> list[Tensor | None]:
    """Gradients of the operands through this block, None where not needed.

    Args:
        backend, operands, plan, settings: as in the forward.
        known: of each reduction, what it came to over all blocks.
        grads: of each reduction, the upstream gradient of each of its results.
        needed: which operands want a gradient.
    """
    upstream = [each for of_one in grads for each in of_one]
    if backend == "cpp":
        numbers, factors, metadata = encode(*_by_direction(plan))
        statistics = []
        for (_, reduction), part in zip(plan, known, strict=True):
            kept = partial.statistics_of(reduction, part)
            nothing = operands.x.new_empty(2, 0, dtype=torch.float64)
            statistics += [torch.stack(kept) if kept else nothing]
            statistics += [nothing] * (result_count(reduction) - 1)
        found = torch.ops.pairtile.similarity_reduce_backward(
            *operands,
            numbers,
            factors,
            metadata,
            settings.budget,
            statistics,
            operands.x.new_empty(0, dtype=torch.float32),
            [each.contiguous() for each in upstream],
            needed,
        )
        return [each if wanted else None for each, wanted in zip(found, needed, strict=True)]
    dtype = operands.scale.dtype
    saved = []
    for (_, reduction), part in zip(plan, known, strict=True):
        kept = [each.to(dtype) for each in partial.statistics_of(reduction, part)]
        assert len(kept) == STATISTICS[type(reduction)]
        saved += kept
    return _SWEEPS[backend].backward(operands, plan, saved, upstream, settings, needed)


def _by_direction(plan: Plan) -> tuple[tuple[Served, ...], tuple[Served, ...]]:
    """(rows, cols); a plan lists its rows first."""
    return tuple(each for dim, each in plan if dim == 1), tuple(each for dim, each in plan if dim == 0)
