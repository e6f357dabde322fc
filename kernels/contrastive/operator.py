"""The public operator: the choice of a backend, between the checks of `arguments` and `request` and the results."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..backends import select_backend
from . import cpp_backend, reference, torch_backend, torch_compiled
from .arguments import DEFAULT_MEMORY_BUDGET as DEFAULT_MEMORY_BUDGET
from .arguments import FEATURE_DTYPES as FEATURE_DTYPES
from .arguments import check_features, check_precision, checked_budget, factor, vector
from .operands import Operands
from .reductions import Reduction
from .request import Request


def similarity_reduce(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor = 0.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    rows: Iterable[Reduction] = (),
    cols: Iterable[Reduction] = (),
    precision: str | None = None,
    memory_budget: int | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Reduce S = scale * x y^T + bias along its rows and its columns in one sweep, without storing S.

    S_ij = scale_i * <x_i, y_j> + bias + row_bias_i + col_bias_j. Every result is differentiable with respect to
    x, y, scale and the biases. Products, sums and statistics are float32 (float64 for float64 inputs), under
    autocast too; on CUDA a float32 product is TF32 only where the caller set torch so. The pairs' own scores
    (`PairScore`) are taken in float64 and rounded once, because the gradient of a well aligned batch hangs on
    them.

    Args:
        x: rows [N, D], float16, bfloat16, float32 or float64; any strides; N may be 0.
        y: columns [M, D], like x. If the two dtypes differ both are promoted as in torch arithmetic.
        scale: a float, or a tensor of shape [] or [1], or [N] (or [N, 1]) for a temperature of each row's own.
        bias: a float, or a tensor of shape [] or [1].
        row_bias: None or a float tensor [N].
        col_bias: None or a float tensor [M].
        rows: reductions over j, one result of shape [N] each.
        cols: reductions over i, one result of shape [M] each.
        precision: None or "ieee", which also refuses to run where torch was told to round the operands of its
            products (`torch.set_float32_matmul_precision`).
        memory_budget: bytes of working memory beside the inputs, the results and their gradients; 64 MiB when
            None. On the `torch` backend a budget below what the smallest tile needs (16 rows by up to 8192
            columns) gives that tile, and 16-bit inputs need a float32 accumulator for the gradient of y on top.

    Returns:
        (row results, column results), each a tuple in the order asked for; float32, or float64 for float64
        inputs.

    Raises:
        ValueError: shapes, lengths, dtypes or devices that do not fit, a target that is no column (on CPU; a
            device assertion elsewhere), an unknown precision, or a memory budget that is not positive.
        TypeError: features that are not floating point, or a reduction or rule of an unknown kind.
        RuntimeError: when a result of another backend than `reference` is differentiated twice.

    Example:
        The loss of CLIP (arXiv:2103.00020) for a batch whose images and texts are aligned by position::

            (others, own), (others_t, own_t) = similarity_reduce(
                x, y, scale=s, rows=(LogSumExp(exclude=Diagonal()), PairScore()),
                cols=(LogSumExp(exclude=Diagonal()), PairScore()))
            loss = (F.softplus(others - own) + F.softplus(others_t - own_t)).mean() / 2
    """
    check_features(x, y)
    budget = checked_budget(memory_budget)
    check_precision(precision, x.device)
    if x.dtype != y.dtype:
        common = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(common), y.to(common)
    operands = _operands(x, y, scale, bias, row_bias, col_bias)
    # The operator states its own precision: autocast would run the product in 16 bits and round its result.
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _serve(operands, rows, cols, budget)
    return _serve(operands, rows, cols, budget)


def _operands(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
) -> Operands:
    n, m, device = x.shape[0], y.shape[0], x.device
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return Operands(
        x,
        y,
        factor(scale, "scale", dtype, device, rows=n),
        None if isinstance(bias, (int, float)) and bias == 0 else factor(bias, "bias", dtype, device),
        None if row_bias is None else vector(row_bias, "row_bias", n, "row of x", dtype, device),
        None if col_bias is None else vector(col_bias, "col_bias", m, "column of S, that is row of y", dtype, device),
    )


def _serve(
    operands: Operands, rows: Iterable[Reduction], cols: Iterable[Reduction], budget: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    request = Request(operands, budget)
    of_rows, of_cols = request.reductions(rows, "rows", 1), request.reductions(cols, "cols", 0)
    backend, _ = select_backend(operands.x.device)
    if backend == "reference":
        serve = reference.similarity_reduce
    elif backend == "cpp" and operands.x.dtype != torch.float64:
        serve = cpp_backend.similarity_reduce
    elif torch.compiler.is_compiling():
        serve = torch_compiled.similarity_reduce
    else:
        serve = torch_backend.similarity_reduce
    results = serve(*operands, of_rows, of_cols, budget)
    return results[: len(of_rows)], results[len(of_rows) :]
