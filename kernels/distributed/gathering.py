"""Rows of all ranks on every rank, with the gradient that is reduced and scattered back."""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .shards import Shards, agreed_shards, all_numbers
from .traffic import record

# torch 2.14 renamed both.
_all_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_rows = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@overload
def gather(
    *tensors: Tensor, group: dist.ProcessGroup | None, wire_dtype: torch.dtype | None = None, said: str = ""
) -> tuple[Shards, tuple[Tensor, ...]]: ...
@overload
def gather(
    *tensors: Tensor | None, group: dist.ProcessGroup | None, wire_dtype: torch.dtype | None = None, said: str = ""
) -> tuple[Shards, tuple[Tensor | None, ...]]: ...
def gather(
    *tensors: Tensor | None, group: dist.ProcessGroup | None, wire_dtype: torch.dtype | None = None, said: str = ""
) -> tuple[Shards, tuple[Tensor | None, ...]]:
    """All ranks' rows of each tensor: [n_r, D] -> [N_global, D], in rank order, with the exact gradient.

    The backward sums the gradients of a row over all ranks and hands each rank its own rows. 16-bit features
    travel as they are; their gradients are summed in float32 and rounded once.

    Args:
        tensors: float tensors [n_r, D], not all of one length; a None, on every rank, stays None.
        group: the process group; None leaves the tensors as they are.
        wire_dtype: travel rounded to this dtype, if it is narrower; the results have the tensors' own.
        said: what else must be the same on all ranks, in words.

    Returns:
        (how the rows of the first tensor lie over the ranks, the gathered tensors).

    Raises:
        ValueError: on every rank, if ranks disagree on the width or the dtype of a tensor, or if one wants a gradient
            where another records none.
    """
    if group is None:
        return Shards((next(t.shape[0] for t in tensors if t is not None),)), tensors
    said = f"gathered {said or 'features'}" + (f" in {wire_dtype}" if wire_dtype is not None else "")
    shards = [layout for layout in agreed_shards(*tensors, group=group, said=said) if layout is not None]
    present = [tensor for tensor in tensors if tensor is not None]
    # A rank whose shard needs no gradient (an empty one, say) must still answer the others in the backward.
    attached = [
        tensor.detach().requires_grad_() if layout.differentiable and not tensor.requires_grad else tensor
        for tensor, layout in zip(present, shards, strict=True)
    ]
    gathered = iter(_GatherRows.apply(shards, wire_dtype, *attached))
    return shards[0], tuple([None if tensor is None else next(gathered) for tensor in tensors])


def gather_tokens(
    tokens: Tensor, mask: Tensor | None, *, group: dist.ProcessGroup | None, wire_dtype: torch.dtype | None = None
) -> tuple[Shards, Tensor, Tensor | None]:
    """All ranks' sets of tokens, padded to the longest rank's: [n_r, L_r, D] -> [N_global, L, D], as `gather` gives rows.

    Args:
        tokens: [n_r, L_r, D]; ranks may differ in n_r and L_r.
        mask: bool [n_r, L_r], True for tokens that count, or None for all; on some ranks it may be None.
        group: the process group; None leaves both as they are.
        wire_dtype: as in `gather`.

    Returns:
        (how the sets lie over the ranks, tokens [N_global, L, D], mask bool [N_global, L], None if all count).

    Raises:
        ValueError: on every rank, if ranks disagree on the width or the dtype of their tokens.
    """
    if group is None:
        return Shards((tokens.shape[0],)), tokens, mask
    count, length, width = tokens.shape
    said = f"gathered tokens: width {width}"
    lengths, masked = zip(*all_numbers([length, int(mask is not None)], group, tokens.device, said), strict=True)
    longest = max(lengths)
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, longest - length))
    shards, (rows,) = gather(padded.reshape(count, longest * width), group=group, wire_dtype=wire_dtype)
    everyone = rows.view(shards.total, longest, width)
    if not any(masked) and min(lengths) == longest:
        return shards, everyone, None
    counts = tokens.new_zeros(count, longest, dtype=torch.uint8)
    counts[:, :length] = 1 if mask is None else mask
    return shards, everyone, _all_gather(counts, shards, "metadata").bool()


def gather_ids(ids: Tensor, shards: Shards) -> Tensor:
    """All ranks' ids: int64 [n_r] -> [N_global], in rank order, of the rows that `shards` describes."""
    if shards.group is None:
        return ids
    return _all_gather(ids.unsqueeze(1), shards, "metadata").squeeze(1)


def gather_counts(count: int, *, device: torch.device, group: dist.ProcessGroup | None) -> Shards:
    """`Shards` of rows that stay where they are, of which the other ranks learn the number alone."""
    if group is None:
        return Shards((count,))
    table = all_numbers([count], group, device, "a count of rows")
    return Shards(tuple(row[0] for row in table), dist.get_rank(group), group)


class _GatherRows(torch.autograd.Function):
    """One node for all tensors, so that the backward's collectives have one order on every rank."""

    @staticmethod
    def forward(ctx: Any, shards: list[Shards], wire_dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shards = shards
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return tuple(
            _all_gather(on_wire(tensor, wire_dtype), layout, "features").to(tensor.dtype)
            for tensor, layout in zip(tensors, shards, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        results = [
            _reduce_scatter(grad, layout).to(dtype) if layout.differentiable else None
            for grad, dtype, layout in zip(grads, ctx.dtypes, ctx.shards, strict=True)
        ]
        return None, None, *results


def on_wire(features: Tensor, wire_dtype: torch.dtype | None) -> Tensor:
    """The features as they travel."""
    narrower = wire_dtype is not None and wire_dtype.itemsize < features.dtype.itemsize
    return features.to(wire_dtype) if narrower else features


def _all_gather(rows: Tensor, shards: Shards, purpose: str) -> Tensor:
    longest = max(shards.sizes)
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: rows.shape[0]] = rows
    gathered = rows.new_empty(shards.world_size * longest, rows.shape[1])
    if gathered.numel():
        record(purpose, (shards.world_size - 1) * padded.nbytes)
        _all_gather_rows(gathered, padded, group=shards.group)
    if min(shards.sizes) == longest:
        return gathered
    return torch.cat([part[:size] for part, size in zip(torch.split(gathered, longest), shards.sizes, strict=True)])


def _reduce_scatter(grad: Tensor, shards: Shards) -> Tensor:
    """Sum over ranks of the gradient of all rows [N_global, D]; returns the rows of this rank."""
    longest = max(shards.sizes)
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if min(shards.sizes) == longest:
        padded = grad.to(dtype).contiguous()
    else:
        padded = grad.new_zeros(shards.world_size * longest, grad.shape[1], dtype=dtype)
        for part, target in zip(torch.split(grad, list(shards.sizes)), torch.split(padded, longest), strict=True):
            target[: part.shape[0]] = part
    own = padded.new_empty(longest, grad.shape[1])
    if own.numel():
        record("gradients", (shards.world_size - 1) * own.nbytes)
        _reduce_scatter_rows(own, padded, group=shards.group)
    return own[: shards.sizes[shards.rank]]
