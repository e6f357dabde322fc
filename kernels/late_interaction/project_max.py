"""Max over tokens of a wide projection, without the tensor [B, L, V]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import select_backend
from ..contrastive.arguments import checked_budget, checked_precision, described
from ..contrastive.autograd import differentiated_once
from ..contrastive.compiled import define
from . import cpp_project, triton_project
from .backends import Projection
from .token_sets import TokenSets, check_mask, padded_sets


def project_max(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    precision: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """For each sample and each column of a projection the maximum over the sample's tokens.

        out_bv = max_l <hidden_bl, weight_v> + bias_v

    The lexical heads of LexLIP (arXiv:2302.02908) and LexVLA (arXiv:2407.17827), and the codes of FDT (arXiv:2303.14865),
    are functions of it. The logits [B, L, V] are never in memory; the gradient goes to the chosen tokens alone, among
    equals the first. A sample whose tokens are all masked gives -inf without gradient.

    Args:
        hidden: [B, L, D], float16, bfloat16, float32 or float64.
        weight: [V, D], of the same dtype, or promoted with it.
        bias: [V] or None.
        mask: bool [B, L], True for tokens that count; None: all.
        precision, memory_budget: as in `similarity_reduce`.

    Returns:
        [B, V], float32 (float64 for float64 inputs), differentiable in hidden, weight and bias.

    Raises:
        ValueError, TypeError: shapes, dtypes, masks or devices that do not fit.
    """
    _check(hidden, weight, bias)
    if mask is not None:
        check_mask(mask, hidden, "hidden")
    if hidden.dtype != weight.dtype:
        common = torch.promote_types(hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(common), weight.to(common)
    device = hidden.device
    backend, _ = select_backend(device)
    settings = checked_budget(memory_budget, backend), checked_precision(precision, backend)
    with torch.autocast(device.type, enabled=False):
        largest = _served(backend, hidden, weight, mask, *settings)
    return largest if bias is None else largest + bias.to(largest.dtype)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    padded_sets(hidden, None, "hidden")
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(f"weight is {described(weight)}: expected [columns, {hidden.shape[2]}], the width of hidden")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}: expected a float16, bfloat16, float32 or float64 tensor")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias is {described(bias)}: expected a floating point tensor [{weight.shape[0]}]")
    if weight.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}: move one of them")


def _served(backend: str, hidden: Tensor, weight: Tensor, mask: Tensor | None, budget: int, precision: str) -> Tensor:
    if backend == "reference":
        return _dense(hidden, weight, mask)
    if hidden.dtype == torch.float64:
        backend = "torch"
    if torch.compiler.is_compiling():
        return _forward_op(hidden, weight, mask, budget, precision, backend)[0]  # type: ignore[no-any-return]
    found: Tensor = _ProjectMax.apply(hidden, weight, mask, budget, precision, backend)[0]
    return found


def _dense(hidden: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if mask is not None:
        hidden = hidden.masked_fill(~mask[:, :, None], 0)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if not logits.shape[1]:
        return logits.sum(1) - torch.inf
    if mask is None:
        return logits.max(1).values
    empty = ~mask.any(1)
    allowed = mask | empty[:, None]
    return logits.masked_fill(~allowed[:, :, None], -torch.inf).max(1).values.masked_fill(empty[:, None], -torch.inf)


def _forward(hidden: TokenSets, weight: Tensor, budget: int, precision: str) -> tuple[Tensor, Tensor]:
    """In blocks of columns, and of samples where one column's logits are too many."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    count, length, columns = hidden.count, hidden.longest, weight.shape[0]
    values = torch.full((count, columns), -torch.inf, dtype=dtype, device=weight.device)
    chosen = torch.full((count, columns), -1, dtype=torch.int32, device=weight.device)
    if not hidden.tokens.shape[0] or not columns:
        return values, chosen
    # Logits, and the converted features of a block, in about half of the budget.
    tokens = hidden.tokens.view(count, length, -1)
    width = max(1, min(columns, budget // (4 * weight.itemsize * weight.shape[1] + 1)))
    samples = max(1, min(count, budget // (4 * 4 * length * (width + weight.shape[1]))))
    for first in range(0, columns, width):
        part = weight[first : first + width].to(dtype).T
        for begin in range(0, count, samples):
            rows = slice(begin, begin + samples)
            block = tokens[rows]
            keep = None if hidden.keep is None else hidden.keep.view(count, length)[rows]
            if keep is not None:
                block = block.masked_fill(~keep[:, :, None], 0)
            logits = block.to(dtype) @ part
            if keep is not None:
                logits = logits.masked_fill_(~keep[:, :, None], -torch.inf)
            found = logits.max(1)
            values[rows, first : first + width] = found.values
            chosen[rows, first : first + width] = found.indices.to(torch.int32).masked_fill(
                found.values == -torch.inf, -1
            )
    return values, chosen


def _backward(
    hidden: TokenSets, weight: Tensor, chosen: Tensor, grad: Tensor, budget: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Sums of the chosen rows, each an `embedding_bag`, which copies none."""
    dtype, length = torch.promote_types(weight.dtype, torch.float32), hidden.longest
    grad = grad.masked_fill(chosen < 0, 0)
    rows = hidden.starts[:, None] + chosen.clamp(min=0)
    dhidden = dweight = None
    if hidden.tokens.shape[0] == 0 or weight.shape[0] == 0:
        return (
            torch.zeros_like(hidden.tokens) if wanted[0] else None,
            torch.zeros_like(weight) if wanted[1] else None,
        )
    if wanted[1]:
        features = hidden.tokens if hidden.keep is None else hidden.tokens.masked_fill(~hidden.keep[:, None], 0)
        features, dweight = features.to(dtype), torch.empty_like(weight)
        step = max(1, budget // (8 * 8 * max(1, hidden.count) + 1))
        for first in range(0, weight.shape[0], step):
            part = slice(first, first + step)
            dweight[part] = F.embedding_bag(
                rows[:, part].T.contiguous(), features, mode="sum", per_sample_weights=grad[:, part].T.contiguous()
            )
    if wanted[0]:
        wide, dhidden = weight.to(dtype), torch.zeros_like(hidden.tokens)
        for sample in range(hidden.count):
            found, order = chosen[sample].clamp(min=0).sort(stable=True)
            bounds = torch.searchsorted(found, torch.arange(length + 1, dtype=torch.int32, device=found.device))
            dhidden[sample * length : (sample + 1) * length] = F.embedding_bag(
                order, wide, bounds, mode="sum", per_sample_weights=grad[sample][order], include_last_offset=True
            )
    return dhidden, dweight


_PROJECTIONS = {
    "torch": Projection(_forward, _backward),
    "cpp": cpp_project.PROJECTION or Projection(_forward, _backward),
    "triton": Projection(triton_project.forward, triton_project.backward),
}


class _ProjectMax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, mask: Tensor | None, budget: int, precision: str, backend: str
    ) -> tuple[Tensor, Tensor]:
        values, chosen = _PROJECTIONS[backend].forward(padded_sets(hidden, mask, "hidden"), weight, budget, precision)
        ctx.save_for_backward(hidden, weight, mask, chosen)
        ctx.settings = budget, backend
        ctx.mark_non_differentiable(chosen)
        return values, chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        budget, backend = ctx.settings
        hidden, weight, *saved = ctx.saved_tensors
        with torch.no_grad():
            found = _gradients((hidden, weight, *saved, grad), budget, backend, ctx.needs_input_grad[:2])
        return *differentiated_once(backend, found, [hidden, weight, grad]), None, None, None, None


def _gradients(
    saved: tuple[Any, ...], budget: int, backend: str, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    hidden, weight, mask, chosen, grad = saved
    with torch.autocast(hidden.device.type, enabled=False):  # who calls backward may have it on
        sets = padded_sets(hidden, mask, "hidden")
        dhidden, dweight = _PROJECTIONS[backend].backward(sets, weight, chosen, grad, budget, wanted)
    return None if dhidden is None else dhidden.view(hidden.shape), dweight


def _operator(
    hidden: Tensor, weight: Tensor, mask: Tensor | None, budget: int, precision: str, backend: str
) -> list[Tensor]:
    return list(_PROJECTIONS[backend].forward(padded_sets(hidden, mask, "hidden"), weight, budget, precision))


def _fake(hidden: Tensor, weight: Tensor, *_: Any) -> list[Tensor]:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    shape = hidden.shape[0], weight.shape[0]
    return [weight.new_empty(shape, dtype=dtype), weight.new_empty(shape, dtype=torch.int32)]


def _operator_backward(*arguments: Any) -> list[Tensor]:
    *saved, budget, backend, wanted = arguments
    found = _gradients(tuple(saved), budget, backend, tuple(wanted))
    return [arguments[0].new_empty(0) if each is None else each.contiguous() for each in found]


def _fake_backward(hidden: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    return [each.new_empty(each.shape if want else (0,)) for each, want in zip((hidden, weight), rest[-1], strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, mask, budget, _, backend = inputs
    ctx.save_for_backward(hidden, weight, mask, output[1])
    ctx.settings = budget, backend


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:2])
    found = _backward_op(*ctx.saved_tensors, grads[0], *ctx.settings, wanted)
    return *(each if want else None for each, want in zip(found, wanted, strict=True)), None, None, None, None


_INPUTS = "Tensor hidden, Tensor weight, Tensor? mask"
_forward_op = define(
    "project_max", _operator, _fake, f"({_INPUTS}, int budget, str precision, str backend) -> Tensor[]"
)
_backward_op = define(
    "project_max_backward",
    _operator_backward,
    _fake_backward,
    f"({_INPUTS}, Tensor chosen, Tensor grad, int budget, str backend, bool[] wanted) -> Tensor[]",
)
_forward_op.register_autograd(_differentiate, setup_context=_setup)
