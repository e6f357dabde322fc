"""The public operator: argument handling and the choice of a backend, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import select_backend
from . import reference, torch_backend, torch_compiled
from .reductions import LogSumExp, PairScore, Reduction, SoftplusSum

#: Bytes of working memory when the caller names none.
DEFAULT_MEMORY_BUDGET = 64 * 2**20

#: The dtypes that features may have.
FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def similarity_reduce(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor = 0.0,
    rows: Sequence[Reduction] = (),
    cols: Sequence[Reduction] = (),
    memory_budget: int | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Reduce S = scale * x y^T + bias along its rows and its columns in one sweep, without storing S.

    Every result is differentiable with respect to x, y, scale and bias. Products, sums and statistics are
    float32 (float64 for float64 inputs), under autocast too; on CUDA a float32 product is TF32 only where the
    caller set torch so. The `torch` backend takes `PairScore` in float64 and rounds it once, because the
    gradient of a well aligned batch hangs on it.

    Args:
        x: rows [N, D], float16, bfloat16, float32 or float64; any strides; N may be 0.
        y: columns [M, D], like x. If the two dtypes differ both are promoted as in torch arithmetic.
        scale: a float, or a tensor of shape [] or [1].
        bias: a float, or a tensor of shape [] or [1].
        rows: reductions over j, one result of shape [N] each.
        cols: reductions over i, one result of shape [M] each.
        memory_budget: bytes of working memory on the `torch` backend beside the inputs, the results and their
            gradients; 64 MiB when None. A budget below what the smallest tile needs (16 rows by up to 8192
            columns) gives that tile. 16-bit inputs need a float32 accumulator for the gradient of y on top.

    Returns:
        (row results, column results), each a tuple in the order asked for; float32, or float64 for float64
        inputs.

    Raises:
        ValueError: shapes that do not fit, or a memory budget that is not positive.
        TypeError: features that are not floating point, or a reduction of an unknown kind.
        RuntimeError: when a result of the `torch` backend is differentiated twice.

    Example:
        The loss of CLIP (arXiv:2103.00020) for a batch whose images and texts are aligned by position::

            (others, own), (others_t, own_t) = similarity_reduce(
                x, y, scale=s, rows=(LogSumExp(exclude=Diagonal()), PairScore()),
                cols=(LogSumExp(exclude=Diagonal()), PairScore()))
            loss = (F.softplus(others - own) + F.softplus(others_t - own_t)).mean() / 2
    """
    _check_features(x, y)
    rows, cols = _checked_reductions(rows, "rows"), _checked_reductions(cols, "cols")
    budget = DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget
    if budget <= 0:
        raise ValueError(f"memory_budget={memory_budget}: expected a positive number of bytes")
    if x.dtype != y.dtype:
        common = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(common), y.to(common)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale_tensor = _scalar(scale, "scale", dtype, x.device)
    bias_tensor = None if isinstance(bias, (int, float)) and bias == 0 else _scalar(bias, "bias", dtype, x.device)

    backend, _ = select_backend(x.device)
    # The operator states its own precision: autocast would run the product in 16 bits and round its result.
    with torch.autocast(x.device.type, enabled=False):
        if backend == "reference":
            results = reference.similarity_reduce(x.to(dtype), y.to(dtype), scale_tensor, bias_tensor, rows, cols)
        else:
            serve = torch_compiled if torch.compiler.is_compiling() else torch_backend
            results = serve.similarity_reduce(x, y, scale_tensor, bias_tensor, rows, cols, budget)
    return results[: len(rows)], results[len(rows) :]


def _check_features(x: Tensor, y: Tensor) -> None:
    for name, features in (("x", x), ("y", y)):
        if not isinstance(features, Tensor) or features.dtype not in FEATURE_DTYPES:
            given = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"{name} is {given}: expected a float16, bfloat16, float32 or float64 tensor")
        if features.dim() != 2:
            raise ValueError(f"{name} has shape {list(features.shape)}: expected two dimensions, [rows, features]")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x {list(x.shape)} and y {list(y.shape)} differ in their last dimension: both must be embeddings of "
            "one space"
        )
    if x.device != y.device:
        raise ValueError(f"x is on {x.device}, y on {y.device}: move one of them")


def _checked_reductions(reductions: Sequence[Reduction], name: str) -> tuple[Reduction, ...]:
    checked = tuple(reductions)
    for reduction in checked:
        if not isinstance(reduction, (LogSumExp, SoftplusSum, PairScore)):
            raise TypeError(f"{name} holds {reduction!r}: expected LogSumExp(...), SoftplusSum(...) or PairScore(...)")
    return checked


def _scalar(value: float | Tensor, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=dtype, device=device)
    if value.shape not in ((), (1,)) or not value.dtype.is_floating_point:
        raise ValueError(
            f"{name} is a {value.dtype} tensor of shape {list(value.shape)}: expected a floating point tensor of "
            "shape [] or [1]"
        )
    return value.reshape(()).to(device=device, dtype=dtype)
