"""The one way from two batches of token sets to their scores: the choice of a backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..backends import select_backend
from ..contrastive.arguments import checked_budget, checked_precision
from . import cpp_backend, triton_backend
from .backends import SERVED, Kernels, Request, define_operators, differentiable, traced
from .blocks import dense, over_pairs
from .formulas import encode_pooling
from .pooling import AttentionPooling, Pooling, check_pooling
from .token_sets import TokenSets, check_same_space

_KERNELS: dict[str, Kernels] = {each.name: each for each in (cpp_backend.KERNELS, triton_backend.KERNELS) if each}
_OPERATORS = {name: define_operators(each) for name, each in _KERNELS.items()}


def token_scores(
    x: TokenSets,
    y: TokenSets,
    *,
    pooling: Pooling,
    candidates: int = 0,
    rows: bool = True,
    cols: bool = False,
    names: tuple[str, str] = ("q", "d"),
    precision: str | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, ...]:
    """Scores of all pairs of sets (x_i, y_j), or of each x_i with its own candidates.

    Of rows: the sum over x_i's tokens of what each pools of y_j; of columns: the sum over y_j's tokens of what each pools of
    x_i. The set whose tokens are pooled gives -inf where it is empty; else an empty sum is 0; neither has a gradient.

    Args:
        x: N sets.
        y: M sets, or N * candidates.
        pooling: what a token makes of its similarities with a set.
        candidates: 0 for all pairs.
        rows, cols: which of the two are asked for.
        names: of x and y in errors.
        precision, memory_budget: as in `similarity_reduce`.

    Returns:
        [N, M] or [N, candidates], rows before columns; float32, float64 for float64 tokens.
    """
    check_pooling(pooling)
    x, y = check_same_space(x, y, *names)
    device = x.tokens.device
    backend, _ = select_backend(device)
    budget, precision = checked_budget(memory_budget, backend), checked_precision(precision, backend)
    if candidates and cols and isinstance(pooling, AttentionPooling):
        raise ValueError("AttentionPooling over candidates has rows alone")
    serve = functools.partial(_serve, backend, x, y, Request(pooling, candidates, rows, cols, budget, precision))
    # The operator states its own precision: autocast would run the products in 16 bits and round their result.
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return serve()
    return serve()


def _serve(backend: str, x: TokenSets, y: TokenSets, request: Request) -> tuple[Tensor, ...]:
    pooling = request.pooling
    if backend in _KERNELS and isinstance(pooling, SERVED) and x.tokens.dtype != torch.float64:
        if torch.compiler.is_compiling():
            return traced(_OPERATORS[backend], x, y, request)
        return differentiable(_KERNELS[backend], x, y, request)
    numbers = (*encode_pooling(pooling), float(request.rows), float(request.cols))
    asked: dict[str, Any] = {"numbers": numbers, "candidates": request.candidates}
    if backend == "reference":
        return dense("pooled_sums", x, y, **asked)
    # What autograd keeps of attention's pooled vectors [n, m, Lx, D] counts as well.
    copies = 6
    if isinstance(pooling, AttentionPooling):
        copies += 4 * -(-x.tokens.shape[1] // max(1, y.longest)) * (1 + request.cols)
    return over_pairs("pooled_sums", x, y, outputs=request.outputs, budget=request.budget, copies=copies, **asked)
