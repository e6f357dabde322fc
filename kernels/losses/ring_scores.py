"""Scores of this rank's token sets with all ranks' sets, which travel round: [n, N], and no more than two shards of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive.autograd import differentiated_once
from ..distributed import Exchange, Ring
from ..distributed.gathering import on_wire
from ..distributed.ring import Field
from ..distributed.shards import all_numbers
from ..dtypes import FEATURE_DTYPES
from .score_terms import Sets

#: Of row sets [n, L, D] and column sets [m, L', D], matrices [n, m]; differentiable in the tokens of both.
Scores = Callable[[Sets, Sets], list[Tensor]]


def ring_scores(scores: Scores, rows: Sets, cols: Sets, exchange: Exchange) -> list[Tensor]:
    """What `scores` gives of this rank's rows and all ranks' columns, matrices [n, N] in rank order, with the exact gradient.

    Gradients of the columns are summed over ranks in float32. The backward scores each block once more.

    Raises:
        ValueError: on every rank, if ranks disagree on the width or the dtype of the columns.
    """
    m, length, width = cols.tokens.shape
    wanted = torch.is_grad_enabled() and (rows.tokens.requires_grad or cols.tokens.requires_grad)
    mine = [m, length, width, FEATURE_DTYPES.index(cols.tokens.dtype), int(cols.mask is not None)]
    flags = [int(wanted), int(torch.is_grad_enabled() and cols.tokens.requires_grad)]
    table = all_numbers([*mine, *flags], exchange.group, cols.tokens.device)
    sizes, lengths, widths, dtypes, masked, any_wanted, any_cols = zip(*table, strict=True)
    if len(set(zip(widths, dtypes, strict=True))) > 1:
        raise ValueError(
            f"tokens differ between ranks (widths {list(widths)}, dtypes {[str(FEATURE_DTYPES[k]) for k in dtypes]}, by "
            "rank): every rank must pass one width and dtype"
        )
    tokens, mask = cols.tokens, cols.mask
    longest = max(lengths)
    if any(masked) or min(lengths) < longest:
        counted = torch.ones(m, length, dtype=torch.bool, device=tokens.device) if mask is None else mask
        mask = F.pad(counted, (0, longest - length))
    tokens = F.pad(tokens, (0, 0, 0, longest - length))
    mine_too = rows.tokens
    if any(any_wanted) and not wanted:
        # This rank's backward must take part in what the others' ask for.
        mine_too = mine_too.detach().requires_grad_()
    job = _Job(scores, exchange, sizes, any(any_cols))
    return list(_RingScores.apply(job, mine_too, rows.mask, tokens, mask))


class _Job:
    def __init__(self, scores: Scores, exchange: Exchange, sizes: tuple[int, ...], of_cols: bool) -> None:
        self.scores, self.exchange, self.sizes, self.of_cols = scores, exchange, sizes, of_cols
        self.ring = Ring(exchange)

    def fields(self, tokens: Tensor, mask: Tensor | None) -> list[Field]:
        found = [Field("features", on_wire(tokens, self.exchange.wire_dtype), self.sizes)]
        return found if mask is None else [*found, Field("metadata", mask.to(torch.uint8), self.sizes)]


class _RingScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, job: _Job, rows: Tensor, row_mask: Tensor | None, cols: Tensor, col_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        blocks: dict[int, list[Tensor]] = {}

        def visit(owner: int, given: list[Tensor]) -> list[Tensor]:
            blocks[owner] = job.scores(Sets(rows, row_mask), _visiting(given, cols.dtype))
            return []

        job.ring.circulate(job.fields(cols, col_mask), visit, _nothing, [])
        ctx.save_for_backward(rows, row_mask, cols, col_mask)
        ctx.job = job
        in_order = [blocks[owner] for owner in range(len(job.sizes))]
        return tuple(torch.cat(parts, 1) for parts in zip(*in_order, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_mask, cols, col_mask = ctx.saved_tensors
        job = ctx.job
        wide = torch.promote_types(rows.dtype, torch.float32)
        of_rows = torch.zeros_like(rows, dtype=wide)
        by_owner = [torch.split(each, list(job.sizes), 1) for each in grads]

        def visit(owner: int, given: list[Tensor]) -> list[Tensor]:
            visiting = _visiting(given, cols.dtype)
            leaves = rows.detach().requires_grad_(), visiting.tokens.detach().requires_grad_(job.of_cols)
            with torch.enable_grad():
                scores = job.scores(Sets(leaves[0], row_mask), Sets(leaves[1], visiting.mask))
            upstream = [each[owner] for each in by_owner]
            wanted = [each for each in leaves if each.requires_grad]
            found = torch.autograd.grad(scores, wanted, upstream, allow_unused=True)
            if found[0] is not None:
                of_rows.add_(found[0])
            if not job.of_cols:
                return []
            return [torch.zeros_like(leaves[1], dtype=wide) if found[1] is None else found[1].to(wide)]

        home = [("gradients", job.sizes)] if job.of_cols else []
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            returned = job.ring.circulate(job.fields(cols, col_mask), visit, _added, home)
        of_cols = returned[0].to(cols.dtype) if job.of_cols and ctx.needs_input_grad[3] else None
        found = [of_rows.to(rows.dtype) if ctx.needs_input_grad[1] else None, of_cols]
        of_rows_once, of_cols_once = differentiated_once("ring", found, [rows, cols, *grads])
        return None, of_rows_once, None, of_cols_once, None


def _visiting(given: list[Tensor], dtype: torch.dtype) -> Sets:
    tokens, *mask = given
    return Sets(tokens.to(dtype), mask[0].bool() if mask else None)


def _added(arrived: list[Tensor], made: list[Tensor]) -> list[Tensor]:
    return [mine.add_(theirs) for theirs, mine in zip(arrived, made, strict=True)]


def _nothing(arrived: list[Tensor], made: list[Tensor]) -> list[Tensor]:
    return made
