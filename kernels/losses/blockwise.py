"""A sum over rows whose gradient is found block by block in the forward, so that no more than a block's scores exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contrastive.autograd import differentiated_once

#: formula(rows, *tensors of those rows, *tensors of all): a scalar.
Formula = Callable[..., Tensor]


def blockwise_sum(
    formula: Formula, by_row: Sequence[Tensor | None], whole: Sequence[Tensor | None], block: int
) -> Tensor:
    """The sum of formula(rows, ...) over blocks of rows, differentiable once.

    A sum needs no waiting for its upstream gradient: each block is differentiated as soon as it is computed, and nothing is
    computed twice. Gradients of `whole` are summed in float32 at least.

    Args:
        formula: as above, differentiable in its tensors; called once for each block.
        by_row: tensors [n, ...] that are cut, the first no None.
        whole: tensors that every block sees.
        block: rows of a block.
    """
    if not torch.is_grad_enabled():
        return _forward_alone(formula, by_row, whole, block)
    total: Tensor = _BlockwiseSum.apply(formula, block, len(by_row), *by_row, *whole)
    return total


# What torch.compiler.disable does, without its import of the whole compiler: the blocks run outside of a compiled graph.
blockwise_sum._torchdynamo_disable = True  # type: ignore[attr-defined]


def _forward_alone(
    formula: Formula, by_row: Sequence[Tensor | None], whole: Sequence[Tensor | None], block: int
) -> Tensor:
    n = by_row[0].shape[0]  # type: ignore[union-attr]
    parts = [
        formula(rows, *(None if each is None else each[rows] for each in by_row), *whole)
        for rows in (slice(first, min(first + block, n)) for first in range(0, n, block) or (0,))
    ]
    return torch.stack(parts).sum()


class _BlockwiseSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, block: int, cut: int, *tensors: Tensor | None) -> Tensor:
        wanted = ctx.needs_input_grad[3:]
        sums: list[Tensor | None] = [
            torch.zeros_like(each, dtype=_wide(each)) if each is not None and want else None
            for each, want in zip(tensors, wanted, strict=True)
        ]
        total: Tensor | None = None
        n = tensors[0].shape[0]  # type: ignore[union-attr]
        for first in range(0, n, block) or (0,):
            rows = slice(first, min(first + block, n))
            leaves = [
                None if each is None else (each[rows] if k < cut else each).detach().requires_grad_(wanted[k])
                for k, each in enumerate(tensors)
            ]
            with torch.enable_grad():
                part = formula(rows, *leaves)
            _add_gradients(
                part, leaves, [each if k >= cut or each is None else each[rows] for k, each in enumerate(sums)]
            )
            total = part.detach() if total is None else total + part.detach()
        ctx.save_for_backward(*sums, *tensors)
        ctx.dtypes = [None if each is None else each.dtype for each in tensors]
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums, tensors = ctx.saved_tensors[: len(ctx.dtypes)], ctx.saved_tensors[len(ctx.dtypes) :]
        with torch.no_grad():
            found = [
                None if each is None else (each * grad.to(each.dtype)).to(dtype)
                for each, dtype in zip(sums, ctx.dtypes, strict=True)
            ]
        return None, None, None, *differentiated_once("blockwise", found, [*tensors, grad])


def _add_gradients(part: Tensor, leaves: Sequence[Tensor | None], sums: Sequence[Tensor | None]) -> None:
    known = [(leaf, total) for leaf, total in zip(leaves, sums, strict=True) if leaf is not None and total is not None]
    if not known or not part.requires_grad:
        return
    found = torch.autograd.grad(part, [leaf for leaf, _ in known], allow_unused=True)
    for (_, total), gradient in zip(known, found, strict=True):
        if gradient is not None:
            total += gradient


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
