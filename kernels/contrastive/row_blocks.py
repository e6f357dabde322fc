"""Terms of rows that know nothing of each other, with their gradient found block by block in the forward.

Where the columns have no gradient, that of term i goes to row i alone. So it can be taken as soon as the row's block is
done, while all its scores are still kept, and multiplied with the upstream gradient later: nothing is made twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import select_backend
from .arguments import checked_budget
from .autograd import differentiated_once

#: formula(x, scale, rows): the terms [n] of the rows x [n, D] = X[rows]; scale is the number that was given, or [n].
Formula = Callable[[Tensor, "float | Tensor", slice], Tensor]

# Of the budget a little less than the sweep leaves for scores (csrc/cpu/problem.cpp), so that all of a block's fit.
_KEPT_SHARE = 0.7
_ROUND = 256


def row_terms(formula: Formula, x: Tensor, scale: float | Tensor, *, columns: int, similarities: int = 1) -> Tensor:
    """formula(x, scale, all rows), [N]: the same numbers up to rounding, in less time.

    Args:
        formula: differentiable in its x and its scale; a row's term depends on nothing else that wants a gradient.
        x: rows [N, D].
        scale: a float, or a tensor of shape [] or [1].
        columns: of S, without gradient.
        similarities: S and its teachers.
    """
    n = x.shape[0]
    block = _block(x, scale, columns, similarities)
    if block is None or block >= n:
        return formula(x, scale, slice(0, n))
    terms: Tensor = _RowTerms.apply(x, scale, formula, block)
    return terms


def _block(x: Tensor, scale: float | Tensor, columns: int, similarities: int) -> int | None:
    """Rows of a block; None where blocks gain nothing: no gradient, or a backend that keeps no scores."""
    wanted = x.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not wanted:
        return None
    # The gradient of float16 has to see the upstream factor of a GradScaler before it is rounded.
    if x.dtype not in (torch.float32, torch.bfloat16) or select_backend(x.device)[0] != "cpp":
        return None
    fitting = int(_KEPT_SHARE * checked_budget(None, "cpp", similarities)) // (4 * similarities * max(1, columns))
    return max(_ROUND, fitting // _ROUND * _ROUND)


class _RowTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float | Tensor, formula: Formula, block: int) -> Tensor:
        wants_x, wants_scale, *_ = ctx.needs_input_grad
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else None
        dscale = x.new_empty(len(x), dtype=torch.float32) if wants_scale else None
        terms = []
        for start in range(0, len(x), block):
            rows = slice(start, min(start + block, len(x)))
            leaf = x[rows].detach().requires_grad_(wants_x)
            factor = scale
            if wants_scale and isinstance(scale, Tensor):
                factor = scale.detach().reshape(()).float().repeat(len(leaf)).requires_grad_()
            with torch.enable_grad():
                found = formula(leaf, factor, rows)
            leaves = [each for each in (leaf, factor) if isinstance(each, Tensor) and each.requires_grad]
            gradients = iter(torch.autograd.grad(found, leaves, torch.ones_like(found)))
            if dx is not None:
                dx[rows] = next(gradients)
            if dscale is not None:
                dscale[rows] = next(gradients)
            terms.append(found.detach())
        ctx.save_for_backward(dx, dscale, x, scale if wants_scale else None)
        return torch.cat(terms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dscale, x, scale = ctx.saved_tensors
        with torch.no_grad():
            of_x = None if dx is None else (dx * grad.unsqueeze(1)).to(dx.dtype)
            of_scale = None if dscale is None else torch.dot(dscale, grad).to(scale.dtype).reshape(scale.shape)
        return *differentiated_once("cpp", [of_x, of_scale], [x, scale, grad]), None, None
