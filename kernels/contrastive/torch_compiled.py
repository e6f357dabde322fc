"""The torch backend as operators of torch.library, which torch.compile puts into its graph as they are.

Traced like ordinary code the loops over tiles would be unrolled: minutes of compilation, anew for each batch
size, and no bound on the memory. Eager calls do not come here: an operator written in Python costs more than the
whole loss of a small batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .operands import Operands, exact_dtype, pair_scores
from .plan import decode, encode
from .reductions import Diagonal, PairScore, Reduction, Target
from .torch_backend import backward_results, forward_results
from .torch_reductions import STATISTICS

# Every operator below takes the operands first; what follows them is named by its schema.
_OPERANDS = "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? row_bias, Tensor? col_bias"
_COUNT = len(Operands._fields)


def _split(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return Operands(*arguments[:_COUNT]), *arguments[_COUNT:]


def _forward(*arguments: Any) -> list[Tensor]:
    operands, numbers, metadata, budget = _split(arguments)
    results, statistics = forward_results(operands, decode(numbers, metadata), budget)
    return [*results, *(tensor for each in statistics for tensor in each)]


def _fake_forward(*arguments: Any) -> list[Tensor]:
    operands, numbers, metadata, _ = _split(arguments)
    plan = decode(numbers, metadata)
    kept = [dim for dim, each in plan for _ in range(STATISTICS[type(each)])]
    return [operands.scale.new_empty(operands.length(dim)) for dim in [*(dim for dim, _ in plan), *kept]]


def _backward(*arguments: Any) -> list[Tensor]:
    operands, numbers, metadata, budget, saved, grads, needed = _split(arguments)
    results = backward_results(operands, decode(numbers, metadata), saved, grads, budget, needed)
    return [operands.scale.new_empty(0) if each is None else each for each in results]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    operands, *_, needed = _split(arguments)
    nothing = operands.scale.new_empty(0)
    return [
        torch.empty_like(operand) if wanted else nothing.clone()
        for operand, wanted in zip(operands, needed, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    operands, numbers, metadata, budget = _split(inputs)
    results = len(decode(numbers, metadata))
    ctx.request = numbers, budget, len(metadata), results
    ctx.save_for_backward(*operands, *metadata, *output[results:])


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    numbers, budget, count, results = ctx.request
    saved = list(ctx.saved_tensors)
    operands, metadata, statistics = saved[:_COUNT], saved[_COUNT:][:count], saved[_COUNT + count :]
    needed = list(ctx.needs_input_grad[:_COUNT])
    found = _backward_op(*operands, numbers, metadata, budget, statistics, grads[:results], needed)
    return *(each if wanted else None for each, wanted in zip(found, needed, strict=True)), None, [None] * count, None


def _pair_scores(*arguments: Any) -> Tensor:
    operands, numbers, metadata, budget, missing = _split(arguments)
    ((dim, reduction),) = decode(numbers, metadata)
    assert isinstance(reduction, PairScore)
    return pair_scores(operands, reduction.pair, dim, budget, missing)


def _fake_pair_scores(*arguments: Any) -> Tensor:
    operands, numbers, metadata, *_ = _split(arguments)
    ((dim, _),) = decode(numbers, metadata)
    device = operands.x.device
    return torch.empty(operands.length(dim), dtype=exact_dtype(device), device=device)


def _define(name: str, function: Any, fake: Any, schema: str) -> Any:
    operator = torch.library.custom_op(f"pairtile::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


_forward_op = _define(
    "torch_similarity_reduce",
    _forward,
    _fake_forward,
    f"({_OPERANDS}, int[] numbers, Tensor[] metadata, int budget) -> Tensor[]",
)
_backward_op = _define(
    "torch_similarity_reduce_backward",
    _backward,
    _fake_backward,
    f"({_OPERANDS}, int[] numbers, Tensor[] metadata, int budget, Tensor[] saved, Tensor[] grads, bool[] needed)"
    " -> Tensor[]",
)
_pair_scores_op = _define(
    "torch_pair_scores",
    _pair_scores,
    _fake_pair_scores,
    f"({_OPERANDS}, int[] numbers, Tensor[] metadata, int budget, float missing) -> Tensor",
)
_forward_op.register_autograd(_differentiate, setup_context=_setup)


def similarity_reduce(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    rows: tuple[Reduction, ...],
    cols: tuple[Reduction, ...],
    budget: int,
) -> tuple[Tensor, ...]:
    """As in `torch_backend`, for code that torch.compile traces."""
    results = _forward_op(x, y, scale, bias, row_bias, col_bias, *encode(rows, cols), budget)
    return tuple(results[: len(rows) + len(cols)])


def traced_pair_scores(operands: Operands, pair: Diagonal | Target, dim: int, budget: int, missing: float) -> Tensor:
    """As `operands.pair_scores`, for code that torch.compile traces."""
    asked = (PairScore(pair),)
    request = encode(asked, ()) if dim == 1 else encode((), asked)
    scores: Tensor = _pair_scores_op(*operands, *request, budget, missing)
    return scores
