"""The gradient of the k largest scores of each owner: sparse, so that no tile is visited for it.

Of S_ij = scale_i <x_i, y_j> + biases the chosen pairs alone have a gradient: N k of N M. The scores themselves come from
the sweep. Every product here is an `embedding_bag`, which adds up weighted rows without copying them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import differentiated_once
from .compiled import OPERANDS, define, fake_gradients, returned
from .operands import Operands
from .plan import result_count
from .reductions import Chosen, Served

_COUNT = len(Operands._fields)
# Of float32 features 64 bytes, below which memory is read in vain.
_LEAST_WIDTH = 16


def with_chosen_gradients(
    results: tuple[Tensor, ...],
    operands: Operands,
    rows: tuple[Served, ...],
    cols: tuple[Served, ...],
    backend: str,
    budget: int,
) -> tuple[Tensor, ...]:
    """A backend's results, those of `Chosen` with the gradient of their scores."""
    attach = _traced_scores if torch.compiler.is_compiling() else _ChosenScores.apply
    found = list(results)
    at = 0
    for dim, reductions in ((1, rows), (0, cols)):
        for reduction in reductions:
            if isinstance(reduction, Chosen) and reduction.of is None:
                found[at] = attach(*operands, found[at], found[at + 1], dim, budget, backend)
            at += result_count(reduction)
    return tuple(found)


class _ChosenScores(torch.autograd.Function):
    """Takes the operands, scores and indices [owners, k], the dimension reduced, budget and backend; gives the scores."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        scores: Tensor = arguments[_COUNT]
        indices, *ctx.request = arguments[_COUNT + 1 :]
        ctx.save_for_backward(*arguments[:_COUNT], indices)
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked once: under activation checkpointing each access would ask for the forward again.
        *given, indices = ctx.saved_tensors
        dim, budget, backend = ctx.request
        operands, needed = Operands(*given), list(ctx.needs_input_grad[:_COUNT])
        with torch.no_grad(), torch.autocast(operands.x.device.type, enabled=False):
            gradients = chosen_gradients(operands, indices, grad, dim, budget, needed)
        gradients = differentiated_once(backend, gradients, [*operands, grad])
        return *gradients, None, None, None, None, None


def chosen_gradients(
    operands: Operands, indices: Tensor, grad: Tensor, dim: int, budget: int, needed: list[bool]
) -> list[Tensor | None]:
    """Gradients of the operands, None where not needed; `grad` is that of the scores at `indices`, -1 being none."""
    x, y, scale, *_ = operands
    found: list[Tensor | None] = [
        None if each is None or not wanted else torch.zeros_like(each, memory_format=torch.contiguous_format)
        for each, wanted in zip(operands, needed, strict=True)
    ]
    if not indices.numel() or not len(x) or not len(y):
        return found
    dx, dy, dscale, dbias, drow_bias, dcol_bias = found
    weights = grad.masked_fill(indices < 0, 0)  # what stands in for a missing pair has no gradient
    pairs = _Pairs(indices, dim, operands.length(1 - dim))
    column = scale.unsqueeze(1) if operands.per_row_scale else scale
    # Of both features, and of what becomes their gradients, within a quarter of the budget.
    width = max(_LEAST_WIDTH, budget // (8 * scale.itemsize * (len(x) + len(y))))
    for start in range(0, x.shape[1], width):
        part = slice(start, start + width)
        x_part, y_part = x[:, part].to(scale.dtype), y[:, part].to(scale.dtype)
        if dx is not None or dscale is not None:
            weighted = pairs.sum_by_row(y_part, weights)
            if dscale is not None:
                cosines = torch.linalg.vecdot(x_part, weighted)
                dscale += cosines if operands.per_row_scale else cosines.sum()
            if dx is not None:
                dx[:, part] = weighted.mul_(column)
        if dy is not None:
            dy[:, part] = pairs.sum_by_column(x_part * column, weights)
    if dbias is not None:
        dbias += weights.sum()
    if drow_bias is not None:
        drow_bias += pairs.sum_by_row(weights.new_ones(len(y), 1), weights).squeeze(1)
    if dcol_bias is not None:
        dcol_bias += pairs.sum_by_column(weights.new_ones(len(x), 1), weights).squeeze(1)
    return found


class _Pairs:
    """Each owner with each of its k partners."""

    def __init__(self, indices: Tensor, dim: int, partners: int) -> None:
        self._of_rows, self._partners = dim == 1, indices.clamp(min=0)
        found, self._order = self._partners.flatten().sort(stable=True)
        self._owners = self._order // indices.shape[1]
        self._offsets = torch.searchsorted(found, torch.arange(partners + 1, device=found.device))

    def sum_by_row(self, features: Tensor, weights: Tensor) -> Tensor:
        """For each row the sum of weights [owners, k] times the features of its columns, [M, any]."""
        return (self._by_owner if self._of_rows else self._by_partner)(features, weights)

    def sum_by_column(self, features: Tensor, weights: Tensor) -> Tensor:
        """For each column the same of the features of its rows, [N, any]."""
        return (self._by_partner if self._of_rows else self._by_owner)(features, weights)

    def _by_owner(self, features: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(self._partners, features, mode="sum", per_sample_weights=weights)

    def _by_partner(self, features: Tensor, weights: Tensor) -> Tensor:
        weights = weights.flatten()[self._order]
        return F.embedding_bag(
            self._owners, features, self._offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )


def _scores(*arguments: Any) -> Tensor:
    scores: Tensor = arguments[_COUNT]
    return scores.clone()


def _backward(*arguments: Any) -> list[Tensor]:
    operands = Operands(*arguments[:_COUNT])
    with torch.autocast(operands.x.device.type, enabled=False):  # who calls backward may have it on
        return returned(operands, chosen_gradients(operands, *arguments[_COUNT:]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, *ctx.request = inputs[_COUNT:]
    ctx.save_for_backward(*inputs[:_COUNT], indices)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *operands, indices = ctx.saved_tensors
    dim, budget, _ = ctx.request
    needed = list(ctx.needs_input_grad[:_COUNT])
    found = _traced_gradients(*operands, indices, grad, dim, budget, needed)
    gradients = (each if wanted else None for each, wanted in zip(found, needed, strict=True))
    return *gradients, None, None, None, None, None


# As in `compiled.py`: for torch.compile, which would trace the chunks of the features one by one.
_traced_scores = define(
    "chosen_scores",
    _scores,
    lambda *arguments: torch.empty_like(arguments[_COUNT]),
    f"({OPERANDS}, Tensor scores, Tensor indices, int dim, int budget, str backend) -> Tensor",
)
_traced_scores.register_autograd(_differentiate, setup_context=_setup)
_traced_gradients = define(
    "chosen_scores_backward",
    _backward,
    fake_gradients,
    f"({OPERANDS}, Tensor indices, Tensor grad, int dim, int budget, bool[] needed) -> Tensor[]",
)
