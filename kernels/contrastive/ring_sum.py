"""A sum over the pairs of all ranks, with its gradient found in the same sweep, while columns travel round.

`ring_reduce` waits for upstream gradients, scores every pair once more and sends the columns round again. A sum with a known
weight needs neither: each block is differentiated as soon as it is added up, and gradients go home with the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.exchange import Exchange
from ..distributed.gathering import on_wire
from ..distributed.ring import Field, Ring
from ..distributed.traffic import record
from .autograd import differentiated_once
from .operands import Operands
from .ring import Layout
from .sharded import NO_EXTRA, agreed, attached

#: (x, y, scale, bias or None, the position of the first row less that of the first column) of a block -> its part of the sum.
BlockSum = Callable[..., Tensor]


@dataclass(frozen=True)
class _Place:
    """Where the shards lie, and whether any rank wants the gradient of its columns."""

    exchange: Exchange
    layout: Layout
    of_cols: bool


def ring_sum(block_sum: BlockSum, exchange: Exchange, operands: Operands) -> Tensor:
    """The sum over this rank's rows and all ranks' columns.

    Args:
        block_sum: as above, differentiable once.
        exchange: a ring.
        operands: this rank's; without row and column biases, one scale for all rows.

    Returns:
        A scalar. Its gradient takes for granted that the upstream gradient is the same on all ranks, as that of a loss
        is, and raises a RuntimeError on every rank where it is not.
    """
    layout, wanted, operands = agreed(exchange, operands, NO_EXTRA, (), ())
    x, y, scale, bias, *_ = attached(operands, wanted)
    total: Tensor = _RingSum.apply(block_sum, _Place(exchange, layout, wanted[1]), x, y, scale, bias)
    return total


class _RingSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block_sum: BlockSum, place: _Place, *given: Tensor | None) -> Tensor:
        layout, of_cols = place.layout, place.of_cols
        x, y, *scalars = given
        assert x is not None
        assert y is not None
        needed = [ctx.needs_input_grad[2], of_cols, *ctx.needs_input_grad[4:]]
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = [
            None if each is None or not want else torch.zeros_like(each, dtype=wide)
            for each, want in zip(given, needed, strict=True)
        ]
        totals: list[Tensor] = []

        def visit(owner: int, fields: list[Tensor]) -> list[Tensor]:
            operands = [x, fields[0].to(y.dtype), *scalars]
            leaves = [
                None if each is None else each.detach().requires_grad_(want)
                for each, want in zip(operands, needed, strict=True)
            ]
            shift = sum(layout.rows[: layout.rank]) - sum(layout.cols[:owner])
            # Hooks of the caller's, activation checkpointing's say, are for what outlives this function.
            with torch.set_grad_enabled(any(needed)), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                part = block_sum(*leaves, shift)
            totals.append(part.detach())
            wanted = [each for each in leaves if each is not None and each.requires_grad]
            found = iter(torch.autograd.grad(part, wanted) if wanted else ())
            mine = [None if each is None or not each.requires_grad else next(found) for each in leaves]
            for k in (0, 2, 3):
                total, more = sums[k], mine[k]
                if total is not None and more is not None:
                    total.add_(more)
            return [mine[1].to(wide)] if mine[1] is not None else []

        fields = [Field("features", on_wire(y, place.exchange.wire_dtype), layout.cols)]
        home = [("gradients", layout.cols)] if of_cols else []
        with torch.autocast(x.device.type, enabled=False):
            returned = Ring(place.exchange).circulate(fields, visit, _added, home)
        if of_cols and ctx.needs_input_grad[3]:
            sums[1] = returned[0]
        ctx.place = place
        ctx.dtypes = [None if each is None else each.dtype for each in given]
        ctx.save_for_backward(*sums, *given)
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.dtypes)
        # Unpacked once: under activation checkpointing a second access is an error.
        saved = ctx.saved_tensors
        sums, given = saved[:count], saved[count:]
        if ctx.place.of_cols:
            _check_same(grad, ctx.place)
        with torch.no_grad():
            found = [
                (each * grad.to(each.dtype)).to(dtype) if each is not None and want else None
                for each, dtype, want in zip(sums, ctx.dtypes, ctx.needs_input_grad[2:], strict=True)
            ]
        return None, None, *differentiated_once("ring", found, [*given, grad])


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _added(arrived: list[Tensor], made: list[Tensor]) -> list[Tensor]:
    return [mine.add_(theirs) for theirs, mine in zip(arrived, made, strict=True)]


def _check_same(grad: Tensor, place: _Place) -> None:
    """Raise on every rank unless all have this upstream gradient: what came home was not multiplied with it."""
    group = place.exchange.group
    everyone = [torch.empty_like(grad) for _ in place.layout.rows]
    record("upstream", (len(everyone) - 1) * grad.nbytes)
    dist.all_gather(everyone, grad.contiguous(), group=group)
    numbers = torch.stack(everyone).flatten().tolist()
    if any(each != numbers[0] and not (each != each and numbers[0] != numbers[0]) for each in numbers):
        raise RuntimeError(
            f"the upstream gradients of this loss differ between ranks ({numbers}): multiply it with the same number on "
            'every rank, or use strategy="gather"'
        )
