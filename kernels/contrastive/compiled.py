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
from .plan import decode, encode, result_count
from .reductions import Chosen, Diagonal, PairScore, Served, Target
from .torch_reductions import STATISTICS

#: Every operator takes the operands first; what follows them is named by its schema.
OPERANDS = "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? row_bias, Tensor? col_bias"
_REQUEST = f"{OPERANDS}, int[] numbers, float[] factors, Tensor[] metadata, int budget"
_COUNT = len(Operands._fields)


def _split(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return Operands(*arguments[:_COUNT]), *arguments[_COUNT:]


def _fake_forward(*arguments: Any) -> list[Tensor]:
    operands, numbers, factors, metadata, *_ = _split(arguments)
    plan = decode(numbers, factors, metadata)
    results = [each for dim, reduction in plan for each in empty_results(operands, dim, reduction)]
    kept = [dim for dim, each in plan for _ in range(STATISTICS[type(each)])]
    return [*results, *(operands.scale.new_empty(operands.length(dim)) for dim in kept)]


def empty_results(operands: Operands, dim: int, reduction: Served) -> list[Tensor]:
    """Results of one reduction, unfilled: what a backend's results look like."""
    owners = operands.length(dim)
    if isinstance(reduction, Chosen):
        scores = operands.scale.new_empty(owners, reduction.k)
        return [scores, scores.new_empty(scores.shape, dtype=torch.int64)]
    return [operands.scale.new_empty(owners)]


def returned(operands: Operands, gradients: list[Tensor | None]) -> list[Tensor]:
    """Gradients as an operator returns them: empty where there is none, and contiguous, as `fake_gradients` says."""
    # inductor compiles for these strides
    return [operands.scale.new_empty(0) if each is None else each.contiguous() for each in gradients]


def fake_gradients(*arguments: Any) -> list[Tensor]:
    """What a backward gives, by the operands, which come first, and by which are needed, which comes last."""
    operands, *_, needed = _split(arguments)
    nothing = operands.scale.new_empty(0)
    return [
        operand.new_empty(operand.shape) if wanted else nothing.clone()
        for operand, wanted in zip(operands, needed, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    operands, numbers, factors, metadata, budget, precision = _split(inputs)
    results = sum(result_count(each) for _, each in decode(numbers, factors, metadata))
    ctx.request = numbers, factors, budget, precision, len(metadata), results
    ctx.save_for_backward(*operands, *metadata, *output[results:])


def define(name: str, function: Any, fake: Any, schema: str) -> Any:
    """The operator `pairtile::<name>`, with what it does to tensors without data."""
    operator = torch.library.custom_op(f"pairtile::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def _define_operators(sweeps: Sweeps) -> Any:
    """`<name>_similarity_reduce` and its backward."""

    def forward(*arguments: Any) -> list[Tensor]:
        operands, numbers, factors, metadata, budget, precision = _split(arguments)
        plan = decode(numbers, factors, metadata)
        results, statistics = sweeps.forward(operands, plan, Settings(budget, precision))
        return [*results, *(tensor for each in statistics for tensor in each)]

    def backward(*arguments: Any) -> list[Tensor]:
        operands, numbers, factors, metadata, budget, precision, saved, grads, needed = _split(arguments)
        plan, settings = decode(numbers, factors, metadata), Settings(budget, precision)
        with torch.autocast(operands.x.device.type, enabled=False):  # who calls backward may have it on
            results = sweeps.backward(operands, plan, saved, grads, settings, needed)
        return returned(operands, results)

    def differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
        numbers, factors, budget, precision, count, results = ctx.request
        saved = list(ctx.saved_tensors)
        operands, metadata, statistics = saved[:_COUNT], saved[_COUNT:][:count], saved[_COUNT + count :]
        needed = list(ctx.needs_input_grad[:_COUNT])
        request = (*operands, numbers, factors, metadata, budget, precision)
        found = backward_op(*request, statistics, grads[:results], needed)
        gradients = (each if wanted else None for each, wanted in zip(found, needed, strict=True))
        # An empty list counts as one of tensors, each with a gradient of its own.
        return *gradients, None, None if factors else [], [None] * count, None, None

    name = f"{sweeps.name}_similarity_reduce"
    forward_op = define(name, forward, _fake_forward, f"({_REQUEST}, str precision) -> Tensor[]")
    more = "str precision, Tensor[] saved, Tensor[] grads, bool[] needed"
    backward_op = define(f"{name}_backward", backward, fake_gradients, f"({_REQUEST}, {more}) -> Tensor[]")
    forward_op.register_autograd(differentiate, setup_context=_setup)
    return forward_op


_OPERATORS = {sweeps.name: _define_operators(sweeps) for sweeps in (torch_backend.SWEEPS, triton_backend.SWEEPS)}


def similarity_reduce(
    backend: str,
    operands: Operands,
    rows: tuple[Served, ...],
    cols: tuple[Served, ...],
    settings: Settings,
) -> tuple[Tensor, ...]:
    """As `autograd.differentiable` with the sweeps of "torch" or "triton", for code that torch.compile traces."""
    results = _OPERATORS[backend](*operands, *encode(rows, cols), *settings)
    return tuple(results[: sum(result_count(each) for each in (*rows, *cols))])


def _pair_scores(*arguments: Any) -> Tensor:
    operands, numbers, factors, metadata, budget, missing = _split(arguments)
    ((dim, reduction),) = decode(numbers, factors, metadata)
    assert isinstance(reduction, PairScore)
    return pair_scores(operands, reduction.pair, dim, budget, missing)


def _fake_pair_scores(*arguments: Any) -> Tensor:
    operands, numbers, factors, metadata, *_ = _split(arguments)
    ((dim, _),) = decode(numbers, factors, metadata)
    device = operands.x.device
    return torch.empty(operands.length(dim), dtype=exact_dtype(device), device=device)


_pair_scores_op = define("torch_pair_scores", _pair_scores, _fake_pair_scores, f"({_REQUEST}, float missing) -> Tensor")


def traced_pair_scores(operands: Operands, pair: Diagonal | Target, dim: int, budget: int, missing: float) -> Tensor:
    """As `operands.pair_scores`, for code that torch.compile traces."""
    asked = (PairScore(pair),)
    request = encode(asked, ()) if dim == 1 else encode((), asked)
    scores: Tensor = _pair_scores_op(*operands, *request, budget, missing)
    return scores
