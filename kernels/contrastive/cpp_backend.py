"""The C++ operators of csrc/cpu: this file hands them the request; forward, backward and autograd are theirs.

For torch.compile, which runs a program on tensors without data, it also says what shapes they return.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .compiled import empty_results
from .operands import Operands
from .plan import Plan, decode, encode, result_count
from .reductions import Above, Chosen, Count, LogSumExp, PairScore, Served, SoftmaxMean, Teacher, rules_of

# As in csrc/cpu/problem.cpp; a test compares the two.
_TILE_ROWS, _LEAST_ROWS = 256, 32
_WORKING_BYTES = 14 << 20


def similarity_reduce(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    rows: tuple[Served, ...],
    cols: tuple[Served, ...],
    budget: int,
) -> tuple[Tensor, ...]:
    """Row results, then column results; features float32, float16 or bfloat16, the rest float32, all on the CPU."""
    request = encode(rows, cols)
    return tuple(torch.ops.pairtile.similarity_reduce(x, y, scale, bias, row_bias, col_bias, *request, budget))


@functools.cache  # a second registration is an error
def register_fakes() -> None:
    """Say what the operators return for tensors without data. Called when the library has been loaded."""
    for name, fake in (
        ("similarity_reduce_forward", _reduce_forward),
        ("similarity_reduce_backward", _reduce_backward),
        ("cross_entropy_sum_forward", _cross_entropy_forward),
        ("cross_entropy_sum_backward", _cross_entropy_backward),
        ("sigmoid_sum_forward", _sigmoid_forward),
    ):
        torch.library.register_fake(f"pairtile::{name}", fake)


def _read_back(plan: Plan) -> int:
    """How many matrices, S and the teachers', the backward looks at: `Plan::matrices` of csrc/cpu/plan.cpp."""
    found: set[Teacher | None] = set()
    for _, each in plan:
        if isinstance(each, SoftmaxMean):
            if each.of is not None and each.under is not None:
                continue
            found |= {each.under} if each.of is None else {each.of, each.under}
        elif isinstance(each, (PairScore, Count, Chosen)) or isinstance(getattr(each, "of", None), Teacher):
            continue
        else:
            found.add(None)
        if any(isinstance(rule, Above) for rule in rules_of(each.exclude)):
            found.add(None)
    return len(found)


def _kept(x: Tensor, y: Tensor, budget: int, matrices: int) -> Tensor:
    """Tiles kept for the backward: as many chunks of rows as fit the budget (csrc/cpu/problem.cpp)."""
    if not matrices:
        return x.new_empty(0, dtype=torch.float32)
    n, m = x.shape[0], y.shape[0]
    rows = torch.sym_min(torch.sym_max(_round_up((n + 7) // 8), _LEAST_ROWS), _TILE_ROWS)
    chunk = matrices * rows * torch.sym_max(_round_up(m), 16)
    working = min(budget // 4, _WORKING_BYTES)
    chunks = torch.sym_min((n + rows - 1) // rows, (budget - working) // (4 * chunk))
    return x.new_empty(chunks * chunk, dtype=torch.float32)


def _round_up(size: int) -> int:
    return (size + 15) // 16 * 16


def _statistics(like: Tensor, owners: int, numbers: int = 2) -> Tensor:
    return like.new_empty(numbers, owners, dtype=torch.float64)


def _known(operands: Operands, dim: int, reduction: Served) -> list[Tensor]:
    """Statistics of one reduction, as many as it has results."""
    if isinstance(reduction, (LogSumExp, SoftmaxMean)):
        return [_statistics(operands.x, operands.length(dim), 2 if isinstance(reduction, LogSumExp) else 3)]
    return [_statistics(operands.x, 0) for _ in range(result_count(reduction))]


def _gradients(inputs: tuple[Tensor | None, ...], wanted: list[bool], like: Tensor) -> list[Tensor]:
    """Contiguous, in the shape and dtype of the input; empty where not wanted."""
    return [
        torch.empty(each.shape, dtype=each.dtype)
        if want and each is not None
        else like.new_empty(0, dtype=torch.float32)
        for each, want in zip(inputs, wanted, strict=True)
    ]


def _reduce_forward(*arguments: Any) -> list[Tensor]:
    operands = Operands(*arguments[:6])
    numbers, factors, metadata, budget, keep = arguments[6:]
    plan = decode(numbers, factors, metadata)
    results = [each for dim, reduction in plan for each in empty_results(operands, dim, reduction)]
    known = [each for dim, reduction in plan for each in _known(operands, dim, reduction)]
    return [*results, *known, _kept(operands.x, operands.y, budget, _read_back(plan) if keep else 0)]


def _reduce_backward(*arguments: Any) -> list[Tensor]:
    return _gradients(arguments[:6], arguments[-1], arguments[0])


def _cross_entropy_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    targets: Tensor | None,
    offset: int,
    row_weight: float,
    col_weight: float,
    budget: int,
    wanted: list[bool],
) -> list[Tensor]:
    value = x.new_empty((), dtype=torch.float32)
    if not any(wanted):
        return [value, *(x.new_empty(0, dtype=torch.float32) for _ in range(4))]
    if col_weight == 0:
        return [value, *_gradients((x, y, scale), wanted, x)]
    n, m = x.shape[0], y.shape[0]
    own = x.new_empty(n, dtype=torch.float64)
    return [value, _statistics(x, n), _statistics(x, m), own, _kept(x, y, budget, 1)]


def _cross_entropy_backward(*arguments: Any) -> list[Tensor]:
    return _gradients(arguments[:3], arguments[-1], arguments[0])


def _sigmoid_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    offset: int,
    weight: float,
    budget: int,
    wanted: list[bool],
) -> list[Tensor]:
    return [x.new_empty((), dtype=torch.float32), *_gradients((x, y, scale, bias), wanted, x)]
