"""The public operator: the choice of a backend, between the checks of `arguments` and `request` and the results."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import select_backend
from ..distributed.exchange import Exchange
from . import compiled, cpp_backend, reference, torch_backend, triton_backend
from .arguments import DEFAULT_MEMORY_BUDGET as DEFAULT_MEMORY_BUDGET
from .arguments import FEATURE_DTYPES as FEATURE_DTYPES
from .arguments import check_features, checked_budget, checked_precision, factor, vector
from .autograd import Settings, differentiable
from .chosen import with_chosen_gradients
from .operands import Operands
from .reductions import Reduction
from .request import Request
from .sharded import NO_EXTRA, Extra, gathered_directions, ring_results

_UNCHANGED = nullcontext()
_SWEEPS = {sweeps.name: sweeps for sweeps in (torch_backend.SWEEPS, triton_backend.SWEEPS)}


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
    group: dist.ProcessGroup | Exchange | None = None,
    strategy: str = "gather",
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Reduce S = scale * x y^T + bias along its rows and its columns in one sweep, without storing S.

    S_ij = scale_i * <x_i, y_j> + bias + row_bias_i + col_bias_j. Every result is differentiable with respect to
    x, y, scale and the biases. Products, sums and statistics are float32 (float64 for float64 inputs), under
    autocast too; on a GPU a float32 product is TF32 only where the caller says so, here or to torch. The pairs' own
    scores (`PairScore`) are taken in float64 and rounded once, because the gradient of a well aligned batch hangs on
    them.

    Args:
        x: rows [N, D], float16, bfloat16, float32 or float64; any strides; N may be 0.
        y: columns [M, D], like x. If the two dtypes differ both are promoted as in torch arithmetic.
        scale: a float, or a tensor of shape [] or [1], or [N] (or [N, 1]) for a temperature of each row's own.
        bias: a float, or a tensor of shape [] or [1].
        row_bias: None or a float tensor [N].
        col_bias: None or a float tensor [M].
        rows: reductions over j, one result of shape [N] each ([N, k] for `TopK` and `ArgTopK`).
        cols: reductions over i, one result of shape [M] each ([M, k]).
        precision: how float32 features are multiplied. "ieee": in float32, and an error where that cannot be had; on
            the `triton` backend also "tf32" and "tf32x3" (three products of rounded halves, about as exact as
            float32). None: "ieee", unless `torch.set_float32_matmul_precision` allows the backend's products more.
        memory_budget: bytes of working memory beside the inputs, the results and their gradients; when None that of
            `use_memory_budget`, else 64 MiB, on `cpp` for S and for each teacher, or 512 MiB on the `triton` backend. On the `torch` backend a budget below what the smallest tile needs (16 rows by up to 8192
            columns) gives that tile, and 16-bit inputs need a float32 accumulator for the gradient of y on top; on
            `triton` both gradients need one where neither side of S fits into a panel.
        group: a process group. Each of its ranks passes its own rows and columns, which may differ in number, and
            what belongs to them (biases, ids, weights, teachers); S is that of all ranks' rows and columns in rank
            order, whose positions rules name and `ArgTopK` gives. The results are those of this rank's rows and
            columns. Gradients of x, y and the biases are summed over the ranks; those of scale and bias are this
            rank's part of the sum. A collective: all ranks ask for the same. An `Exchange` says more than `strategy`.
        strategy: "gather" or "ring", as in `Exchange`. `reference` always gathers.

    Returns:
        (row results, column results), each a tuple in the order asked for; float32, or float64 for float64
        inputs; indices int64.

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
    exchange = group if isinstance(group, Exchange) or group is None else Exchange(group, strategy)
    if exchange is not None and dist.get_world_size(exchange.group) == 1:
        exchange = None
    return reduced(exchange, NO_EXTRA, x, y, scale, bias, row_bias, col_bias, rows, cols, precision, memory_budget)


def reduced(
    exchange: Exchange | None,
    extra: Extra,
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: float | Tensor = 0.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    rows: Iterable[Reduction] = (),
    cols: Iterable[Reduction] = (),
    precision: str | None = None,
    memory_budget: int | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As `similarity_reduce`; in a ring with extra rows and columns at the end of x and y."""
    check_features(x, y)
    backend, _ = select_backend(x.device)
    settings = Settings(checked_budget(memory_budget, backend), checked_precision(precision, backend))
    operands = resolved_operands(x, y, scale, bias, row_bias, col_bias)
    # The operator states its own precision: autocast would run the product in 16 bits and round its result.
    with torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else _UNCHANGED:
        if exchange is None:
            return _serve(backend, operands, rows, cols, settings, memory_budget)
        return _sharded(exchange, extra, backend, operands, rows, cols, settings, memory_budget)


def _sharded(
    exchange: Exchange,
    extra: Extra,
    backend: str,
    operands: Operands,
    rows: Iterable[Reduction],
    cols: Iterable[Reduction],
    settings: Settings,
    memory_budget: int | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    if exchange.strategy == "ring" and backend != "reference":
        return ring_results(exchange, operands, rows, cols, backend, settings, extra)
    of_rows: tuple[Tensor, ...] = ()
    of_cols: tuple[Tensor, ...] = ()
    for direction in gathered_directions(exchange, operands, list(rows), list(cols)):
        found = _serve(backend, direction.operands, direction.rows, direction.cols, settings, memory_budget)
        if backend == "reference":
            # Its results need not depend on what was gathered, yet every rank must answer in the backward.
            found = _tied(found[0], direction.operands), _tied(found[1], direction.operands)
        of_rows, of_cols = of_rows + found[0], of_cols + found[1]
    return of_rows, of_cols


def _tied(results: tuple[Tensor, ...], operands: Operands) -> tuple[Tensor, ...]:
    nothing = torch.stack([each.reshape(-1)[:0].sum() for each in operands if each is not None]).sum()
    return tuple([each + nothing.to(each.dtype) if each.is_floating_point() else each for each in results])


def resolved_operands(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
) -> Operands:
    """Scale and biases as tensors of the accumulation dtype, checked."""
    if x.dtype != y.dtype:
        common = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(common), y.to(common)
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
    backend: str,
    operands: Operands,
    rows: Iterable[Reduction],
    cols: Iterable[Reduction],
    settings: Settings,
    memory_budget: int | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    request = Request(operands, settings.budget)
    of_rows, of_cols = request.reductions(rows, "rows", 1), request.reductions(cols, "cols", 0)
    if request.teachers:
        settings = settings._replace(budget=checked_budget(memory_budget, backend, 1 + request.teachers))
    if operands.x.dtype == torch.float64 and backend in ("cpp", "triton"):
        backend = "torch"
    if backend == "reference":
        results = reference.similarity_reduce(*operands, of_rows.served, of_cols.served, settings.budget)
    elif backend == "cpp":
        results = cpp_backend.similarity_reduce(*operands, of_rows.served, of_cols.served, settings.budget)
    elif torch.compiler.is_compiling():
        results = compiled.similarity_reduce(backend, operands, of_rows.served, of_cols.served, settings)
    else:
        results = differentiable(_SWEEPS[backend], operands, of_rows.served, of_cols.served, settings)
    if backend != "reference" and (of_rows.makers or of_cols.makers):
        results = with_chosen_gradients(results, operands, of_rows.served, of_cols.served, backend, settings.budget)
    return of_rows.assemble(results[: of_rows.results]), of_cols.assemble(results[of_rows.results :])
