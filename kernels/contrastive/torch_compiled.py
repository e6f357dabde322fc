"""The torch backend as two operators, which torch.compile puts into its graph as they are.

Traced like ordinary code the loops over tiles would be unrolled: minutes of compilation, anew for each batch
size, and no bound on the memory. Eager calls do not come here: an operator written in Python costs more than the
whole loss of a small batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reductions import Diagonal, LogSumExp, PairScore, Reduction, SoftplusSum
from .torch_backend import backward_results, forward_results

_KINDS: list[Any] = [LogSumExp, SoftplusSum, PairScore]
_Plan = list[tuple[int, Reduction]]


def _encode(rows: tuple[Reduction, ...], cols: tuple[Reduction, ...]) -> list[int]:
    """An operator takes numbers: dimension, kind, whether it has a rule, and the rule's offset, of each reduction."""
    numbers = []
    for dim, reductions in ((1, rows), (0, cols)):
        for reduction in reductions:
            (rule,) = vars(reduction).values()
            numbers += [dim, _KINDS.index(type(reduction)), int(rule is not None), rule.offset if rule else 0]
    return numbers


def _decode(numbers: list[int]) -> _Plan:
    fours = [numbers[k : k + 4] for k in range(0, len(numbers), 4)]
    return [(dim, _KINDS[kind](Diagonal(offset) if ruled else None)) for dim, kind, ruled, offset in fours]


def _forward(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, numbers: list[int], budget: int) -> list[Tensor]:
    results, statistics = forward_results(x, y, scale, bias, _decode(numbers), budget)
    return [*results, *(tensor for each in statistics for tensor in each)]


def _fake_forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, numbers: list[int], budget: int
) -> list[Tensor]:
    lengths = [(x if dim == 1 else y).shape[0] for dim, _ in _decode(numbers)]
    counts = [_statistics_of(reduction) for _, reduction in _decode(numbers)]
    doubled = [length for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
    return [scale.new_empty(length) for length in (*lengths, *doubled)]


def _statistics_of(reduction: Reduction) -> int:
    return 2 if isinstance(reduction, LogSumExp) else 0


def _backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    saved: list[Tensor],
    grads: list[Tensor],
    numbers: list[int],
    budget: int,
    needed: list[bool],
) -> list[Tensor]:
    remaining, plan = iter(saved), _decode(numbers)
    statistics = [[next(remaining) for _ in range(_statistics_of(reduction))] for _, reduction in plan]
    results = backward_results(x, y, scale, bias, plan, statistics, list(grads), budget, tuple(needed))
    return [scale.new_empty(0) if each is None else each for each in results]


def _fake_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    saved: list[Tensor],
    grads: list[Tensor],
    numbers: list[int],
    budget: int,
    needed: list[bool],
) -> list[Tensor]:
    like = (x, y, scale, scale)
    return [torch.empty_like(a) if wanted else scale.new_empty(0) for a, wanted in zip(like, needed, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, y, scale, bias, numbers, budget = inputs
    ctx.plan = numbers, budget
    ctx.save_for_backward(x, y, scale, bias, *output[len(numbers) // 4 :])


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    x, y, scale, bias, *saved = ctx.saved_tensors
    numbers, budget = ctx.plan
    needed = list(ctx.needs_input_grad[:4])
    count = len(numbers) // 4
    results = similarity_reduce_backward(x, y, scale, bias, saved, grads[:count], numbers, budget, needed)
    return *(each if wanted else None for each, wanted in zip(results, needed, strict=True)), None, None


_INPUTS = "Tensor x, Tensor y, Tensor scale, Tensor? bias"
_forward_op = torch.library.custom_op(
    "pairtile::torch_similarity_reduce",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, int[] numbers, int budget) -> Tensor[]",
)
similarity_reduce_backward = torch.library.custom_op(
    "pairtile::torch_similarity_reduce_backward",
    _backward,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor[] saved, Tensor[] grads, int[] numbers, int budget, bool[] needed) -> Tensor[]",
)
_forward_op.register_fake(_fake_forward)
similarity_reduce_backward.register_fake(_fake_backward)
_forward_op.register_autograd(_differentiate, setup_context=_setup)


def similarity_reduce(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: tuple[Reduction, ...],
    cols: tuple[Reduction, ...],
    budget: int,
) -> tuple[Tensor, ...]:
    """As in `torch_backend`, for code that torch.compile traces."""
    return tuple(_forward_op(x, y, scale, bias, _encode(rows, cols), budget)[: len(rows) + len(cols)])
