"""The launches of the soft maxima, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..contrastive.triton_backward import unit_of
from ..contrastive.triton_kernels import launching
from ..contrastive.triton_kernels.launches import reach
from ..contrastive.triton_kernels.launching import cdiv
from .backends import Request
from .pooling import LogSumExpPooling, SoftmaxPooling
from .token_sets import TokenSets
from .triton_configurations import check_precision, next_power, soft_config, soft_gradient_config
from .triton_kernels.soft_backward import Pooled, soft_gradient
from .triton_kernels.soft_forward import soft_sweep
from .triton_sweeps import NOTHING, Directed, filled_width, side_of


def soft_launches(x: TokenSets, y: TokenSets, scores: list[Tensor], kept: list[Tensor], request: Request) -> None:
    """Fills the scores that are asked for and, if there are any, what is kept of them. A direction is a sweep of its own."""
    if not x.count or not y.count:
        return
    check_precision(launching.architecture(x.tokens.device), request.precision)
    rows, cols = _directions(scores, kept, request)
    if rows is not NOTHING:
        _sweep(x, y, rows, request, held_is_x=True)
    if cols is not NOTHING:
        _sweep(y, x, cols, request, held_is_x=False)


def soft_gradients(
    x: TokenSets,
    y: TokenSets,
    request: Request,
    kept: list[Tensor],
    grads: list[Tensor],
    wanted: tuple[bool, bool],
    x_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """As `Kernels.backward`, that of x in `x_dtype`."""
    unit = None
    if x.tokens.dtype == torch.float16:
        unit = _unit(x, y, request, grads)
        grads = [each / unit for each in grads]
    rows, cols = _directions(grads, kept, request)
    dx = _gradient(x, y, rows, cols, unit, request, True, x_dtype) if wanted[0] else None
    dy = _gradient(y, x, cols, rows, unit, request, False, y.tokens.dtype) if wanted[1] else None
    return dx, dy


def _directions(scores: list[Tensor], kept: list[Tensor], request: Request) -> tuple[Directed, Directed]:
    found = iter(Directed(each, kept[k] if kept else None) for k, each in enumerate(scores))
    rows, cols = (next(found) if asked else NOTHING for asked in (request.rows, request.cols))
    return rows, cols


def _sweep(held: TokenSets, streamed: TokenSets, of_held: Directed, request: Request, held_is_x: bool) -> None:
    scores, kept, candidates = of_held.scores, of_held.chosen, request.candidates
    assert scores is not None
    arch, width = launching.architecture(scores.device), filled_width(held.tokens.shape[1])
    config = soft_config(arch, held.tokens.dtype, width, request.precision)
    span = config.block_m if candidates else min(config.block_m, next_power(held.longest))
    groups = cdiv(held.count, config.block_m // span)
    arguments = _shared(held, streamed, request, config.block_k, held_is_x) | {
        "scores": scores,
        "score_strides": scores.stride() if held_is_x else scores.stride()[::-1],
        "kept": kept,
        "partners": 0 if kept is None else kept.shape[1],
        "groups": groups,
        "temperature": _temperature(request),
        "SPAN": span,
    }
    programs = max(held.count, streamed.count) if candidates else groups * streamed.count
    launching.run(soft_sweep, (programs,), config, arguments)


def _gradient(
    to: TokenSets,
    source: TokenSets,
    own: Directed,
    other: Directed,
    unit: Tensor | None,
    request: Request,
    to_x: bool,
    dtype: torch.dtype,
) -> Tensor:
    arch, width = launching.architecture(to.tokens.device), filled_width(to.tokens.shape[1])
    out = launching.empty(to.tokens.shape[0], width, dtype=dtype, device=to.tokens.device)
    if not out.numel():
        return out
    config, cols = soft_gradient_config(arch, to.tokens.dtype, width, request.precision)
    chunks = cdiv(to.longest, config.block_m)
    arguments = _shared(to, source, request, config.block_k, to_x) | {
        "out": out,
        "of_held": _pooled(own, request.candidates, to_x),
        "of_streamed": _pooled(other, request.candidates, to_x),
        "chunks": chunks,
        "unit": unit,
        "rate": 1 / _temperature(request),
        "COLS": cols,
    }
    launching.run(soft_gradient, (chunks * to.count * cdiv(width, cols),), config, arguments)
    return out[:, : to.tokens.shape[1]].contiguous()


def _shared(held: TokenSets, streamed: TokenSets, request: Request, block_k: int, held_is_x: bool) -> dict[str, Any]:
    width = filled_width(held.tokens.shape[1])
    return {
        "held": side_of(held),
        "streamed": side_of(streamed),
        "candidates": request.candidates,
        "d": width,
        "sharpness": math.log2(math.e) / _temperature(request),
        "PAIRS": (1 if held_is_x else 2) if request.candidates else 0,
        "SOFTMAX": isinstance(request.pooling, SoftmaxPooling),
        "WHOLE": width <= block_k,
        "EVEN": width > 0 and width % block_k == 0,
        "PRECISION": request.precision,
        "INTERPRETED": launching.interpreting(),
    }


def _pooled(directed: Directed, candidates: int, held_is_x: bool) -> Pooled | None:
    grads, kept = directed
    if grads is None or kept is None:
        return None
    if candidates:  # one value for each candidate, whichever side that is
        return Pooled(grads.contiguous(), (0, 1) if held_is_x else (1, 0), kept, kept.shape[1])
    return Pooled(grads, grads.stride() if held_is_x else grads.stride()[::-1], kept, kept.shape[1])


def _temperature(request: Request) -> float:
    assert isinstance(request.pooling, (SoftmaxPooling, LogSumExpPooling))
    return request.pooling.temperature


def _unit(x: TokenSets, y: TokenSets, request: Request, grads: list[Tensor]) -> Tensor:
    """A power of two in which the weights of float16 pairs stay in its range."""
    most: Tensor | float = 1.0
    if isinstance(request.pooling, SoftmaxPooling) and x.tokens.numel() and y.tokens.numel():
        one = torch.ones((), device=x.tokens.device)
        most = 1 + 2 * reach(x.tokens, y.tokens, one) / _temperature(request)
    return unit_of([grad * most for grad in grads], x.tokens.dtype, x.tokens.device)
