"""Tokens to their new places, and back: two linear maps, each the other's transpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import select_backend
from ..build_cuda import with_cuda
from ..contrastive.compiled import define
from .matching import Matching


class Combination(NamedTuple):
    """A backend.

    Attributes:
        combine: (x [B, N, C], kept [B, S], sources [B, R], places [B, R], factors float32 [B, N] or None, divisors float32
            [B, S] or None) -> [B, S, C] in the dtype of x: the sum of factor * token over the kept token and the sources of
            a place, in that order and in float32, over its divisor, rounded once.
        spread: (x [B, S, C], place_of [B, N], factors [B, N] or None, divisors [B, S] or None) -> [B, N, C]: factor * x at
            the token's place over the divisor there.
    """

    combine: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    spread: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    average: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]] | None = (
        None
    )


def _combine(
    x: Tensor, kept: Tensor, sources: Tensor, places: Tensor, factors: Tensor | None, divisors: Tensor | None
) -> Tensor:
    width = x.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if factors is not None:
        wide = wide * factors.unsqueeze(-1)
    total = wide.gather(1, kept.unsqueeze(-1).expand(-1, -1, width))
    moved = wide.gather(1, sources.unsqueeze(-1).expand(-1, -1, width))
    total = total.scatter_add(1, places.unsqueeze(-1).expand(-1, -1, width), moved)
    return (total if divisors is None else total / divisors.unsqueeze(-1)).to(x.dtype)


def _spread(x: Tensor, place_of: Tensor, factors: Tensor | None, divisors: Tensor | None) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if divisors is not None:
        wide = wide / divisors.unsqueeze(-1)
    found = wide.gather(1, place_of.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return (found if factors is None else found * factors.unsqueeze(-1)).to(x.dtype)


TORCH = Combination(_combine, _spread)
#: "cpp" and "triton" where they have kernels of their own, "cuda" where its operators take triton's place.
COMBINATIONS: dict[str, Combination] = {"torch": TORCH}


def _serving(backend: str, x: Tensor) -> Combination:
    return TORCH if x.dtype == torch.float64 else COMBINATIONS.get(with_cuda(backend, x.device), TORCH)


def combine(x: Tensor, matching: Matching, factors: Tensor | None, divisors: Tensor | None) -> Tensor:
    """[B, N, C] -> [B, S, C], differentiable in x; factors and divisors take no gradient."""
    backend, _ = select_backend(x.device)
    if backend == "reference":
        return _combine(x, matching.kept, matching.sources, matching.places, factors, divisors)
    if torch.compiler.is_compiling():
        return _combine_op(x, *_tensors(matching), factors, divisors, backend)  # type: ignore[no-any-return]
    found: Tensor = _Combine.apply(x, matching, factors, divisors, backend)
    return found


def average(x: Tensor, matching: Matching, factors: Tensor | None, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `Combination.average`, differentiable in x."""
    backend, _ = select_backend(x.device)
    if backend == "reference" or _serving(backend, x).average is None:
        totals = _totals(matching, sizes)
        return combine(x, matching, factors, totals), totals
    if torch.compiler.is_compiling():
        tokens, totals = _average_op(x, *_tensors(matching), factors, sizes, backend)
        return tokens, totals
    tokens, totals = _Average.apply(x, matching, factors, sizes, backend)
    return tokens, totals


def _totals(matching: Matching, sizes: Tensor | None) -> Tensor:
    if sizes is None:
        ones = torch.ones(matching.kept.shape, dtype=torch.float32, device=matching.kept.device)
        return ones.scatter_add(1, matching.places, ones.new_ones(()).expand(matching.places.shape))
    return sizes.gather(1, matching.kept).scatter_add(1, matching.places, sizes.gather(1, matching.sources))


def spread(x: Tensor, matching: Matching) -> Tensor:
    """[B, S, C] -> [B, N, C]: every token gets what its place holds; differentiable in x."""
    backend, _ = select_backend(x.device)
    if backend == "reference":
        return _spread(x, matching.place_of(), None, None)
    if torch.compiler.is_compiling():
        return _spread_op(x, *_tensors(matching), None, None, backend)  # type: ignore[no-any-return]
    found: Tensor = _Spread.apply(x, matching, None, None, backend)
    return found


def _tensors(matching: Matching) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return matching.kept, matching.sources, matching.places, matching.place_of()


class _Combine(torch.autograd.Function):
    """Linear in x, so that a second differentiation is that of its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        ctx.given = given
        matching, factors, divisors, backend = given
        tensors = matching.kept, matching.sources, matching.places
        return _serving(backend, x).combine(x, *tensors, factors, divisors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(grad, *ctx.given), None, None, None, None


class _Average(torch.autograd.Function):
    """A combination whose divisors are found on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        matching, factors, sizes, backend = given
        found = _serving(backend, x).average
        assert found is not None
        tokens, totals = found(x, matching.kept, matching.sources, matching.places, factors, sizes)
        ctx.mark_non_differentiable(totals)
        ctx.given = matching, factors, totals, backend
        return tokens, totals

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Spread.apply(grad, *ctx.given), None, None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        ctx.given = given
        matching, factors, divisors, backend = given
        return _serving(backend, x).spread(x, matching.place_of(), factors, divisors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Combine.apply(grad, *ctx.given), None, None, None, None


_MATCHED = "Tensor x, Tensor kept, Tensor sources, Tensor places, Tensor place_of"
_GIVEN = f"{_MATCHED}, Tensor? factors, Tensor? divisors, str backend"


def _combine_operator(x: Tensor, *given: Any) -> Tensor:
    kept, sources, places, _, factors, divisors, backend = given
    return _serving(backend, x).combine(x, kept, sources, places, factors, divisors)


def _spread_operator(x: Tensor, *given: Any) -> Tensor:
    _, _, _, place_of, factors, divisors, backend = given
    return _serving(backend, x).spread(x, place_of, factors, divisors)


_combine_op = define(
    "combine_tokens",
    _combine_operator,
    lambda x, kept, *_: x.new_empty(x.shape[0], kept.shape[1], x.shape[2]),
    f"({_GIVEN}) -> Tensor",
)
_spread_op = define(
    "spread_tokens",
    _spread_operator,
    lambda x, kept, sources, places, place_of, *_: x.new_empty(x.shape[0], place_of.shape[1], x.shape[2]),
    f"({_GIVEN}) -> Tensor",
)


def _average_operator(x: Tensor, *given: Any) -> list[Tensor]:
    kept, sources, places, _, factors, sizes, backend = given
    found = _serving(backend, x).average
    assert found is not None
    return list(found(x, kept, sources, places, factors, sizes))


_average_op = define(
    "average_tokens",
    _average_operator,
    lambda x, kept, *_: [
        x.new_empty(x.shape[0], kept.shape[1], x.shape[2]),
        x.new_empty(kept.shape, dtype=torch.float32),
    ],
    f"({_MATCHED}, Tensor? factors, Tensor? sizes, str backend) -> Tensor[]",
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _combine_differentiated(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _spread_op(grad, *ctx.saved_tensors, ctx.backend), *[None] * 7


def _spread_differentiated(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _combine_op(grad, *ctx.saved_tensors, ctx.backend), *[None] * 7


def _setup_average(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, *tensors, factors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, factors, output[1])


def _average_differentiated(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    return _spread_op(grads[0], *ctx.saved_tensors, ctx.backend), *[None] * 7


_average_op.register_autograd(_average_differentiated, setup_context=_setup_average)
_combine_op.register_autograd(_combine_differentiated, setup_context=_setup)
_spread_op.register_autograd(_spread_differentiated, setup_context=_setup)
