"""The backends written in Python as operators of torch.library, which torch.compile puts into its graph as they are.

Traced like ordinary code the loops over tiles would be unrolled: minutes of compilation, anew for each batch
size, and no bound on the memory. Eager calls do not come here: an operator written in Python costs more than the
whole loss of a small batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import torch_backend, triton_backend
from .autograd import Settings, Sweeps
from .operands import Operands, exact_dtype, pair_scores
from .plan import decode, encode
from .reductions import Diagonal, PairScore, Reduction, Target
from .torch_reductions import STATISTICS

# Every operator below takes the operands first; what follows them is named by its schema.
_OPERANDS = "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? row_bias, Tensor? col_bias"
_REQUEST = f"{_OPERANDS}, int[] numbers, Tensor[] metadata, int budget"
_COUNT = len(Operands._fields)


def _split(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return Operands(*arguments[:_COUNT]), *arguments[_COUNT:]


def _fake_forward(*arguments: Any) -> list[Tensor]:
    operands, numbers, metadata, *_ = _split(arguments)
    plan = decode(numbers, metadata)
    kept = [dim for dim, each in plan for _ in range(STATISTICS[type(each)])]
    return [operands.scale.new_empty(operands.length(dim)) for dim in [*(dim for dim, _ in plan), *kept]]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    operands, *_, needed = _split(arguments)
    nothing = operands.scale.new_empty(0)
    return [
        operand.new_empty(operand.shape) if wanted else nothing.clone()
        for operand, wanted in zip(operands, needed, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    operands, numbers, metadata, budget, precision = _split(inputs)
    results = len(decode(numbers, metadata))
    ctx.request = numbers, budget, precision, len(metadata), results
    ctx.save_for_backward(*operands, *metadata, *output[results:])


def _define(name: str, function: Any, fake: Any, schema: str) -> Any:
    operator = torch.library.custom_op(f"pairtile::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def _define_operators(sweeps: Sweeps) -> Any:
    """`<name>_similarity_reduce` and its backward."""

    def forward(*arguments: Any) -> list[Tensor]:
        operands, numbers, metadata, budget, precision = _split(arguments)
        results, statistics = sweeps.forward(operands, decode(numbers, metadata), Settings(budget, precision))
        return [*results, *(tensor for each in statistics for tensor in each)]

    def backward(*arguments: Any) -> list[Tensor]:
        operands, numbers, metadata, budget, precision, saved, grads, needed = _split(arguments)
        settings = Settings(budget, precision)
        with torch.autocast(operands.x.device.type, enabled=False):  # who calls backward may have it on
            results = sweeps.backward(operands, decode(numbers, metadata), saved, grads, settings, needed)
        # contiguous, as the fake says: inductor compiles for these strides
        return [operands.scale.new_empty(0) if each is None else each.contiguous() for each in results]

    def differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
        numbers, budget, precision, count, results = ctx.request
        saved = list(ctx.saved_tensors)
        operands, metadata, statistics = saved[:_COUNT], saved[_COUNT:][:count], saved[_COUNT + count :]
        needed = list(ctx.needs_input_grad[:_COUNT])
        request = (*operands, numbers, metadata, budget, precision)
        found = backward_op(*request, statistics, grads[:results], needed)
        gradients = (each if wanted else None for each, wanted in zip(found, needed, strict=True))
        return *gradients, None, [None] * count, None, None

    name = f"{sweeps.name}_similarity_reduce"
    forward_op = _define(name, forward, _fake_forward, f"({_REQUEST}, str precision) -> Tensor[]")
    more = "str precision, Tensor[] saved, Tensor[] grads, bool[] needed"
    backward_op = _define(f"{name}_backward", backward, _fake_backward, f"({_REQUEST}, {more}) -> Tensor[]")
    forward_op.register_autograd(differentiate, setup_context=_setup)
    return forward_op


_OPERATORS = {sweeps.name: _define_operators(sweeps) for sweeps in (torch_backend.SWEEPS, triton_backend.SWEEPS)}


def similarity_reduce(
    backend: str,
    operands: Operands,
    rows: tuple[Reduction, ...],
    cols: tuple[Reduction, ...],
    settings: Settings,
) -> tuple[Tensor, ...]:
    """As `autograd.differentiable` with the sweeps of "torch" or "triton", for code that torch.compile traces."""
    results = _OPERATORS[backend](*operands, *encode(rows, cols), *settings)
    return tuple(results[: len(rows) + len(cols)])


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


_pair_scores_op = _define(
    "torch_pair_scores", _pair_scores, _fake_pair_scores, f"({_REQUEST}, float missing) -> Tensor"
)


def traced_pair_scores(operands: Operands, pair: Diagonal | Target, dim: int, budget: int, missing: float) -> Tensor:
    """As `operands.pair_scores`, for code that torch.compile traces."""
    asked = (PairScore(pair),)
    request = encode(asked, ()) if dim == 1 else encode((), asked)
    scores: Tensor = _pair_scores_op(*operands, *request, budget, missing)
    return scores
