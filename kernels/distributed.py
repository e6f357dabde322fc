"""Exact gradients across ranks: an all-gather of unequal shards and the global mean of a loss.

The convention, which every loss keeps (L is the loss of the whole batch, W the number of ranks): rank r returns
the value L with the gradient of its share L_r = W / N_global * (sum of its own terms), so that L is the mean of
the L_r also on unequal shards. Gradients of gathered rows are summed over ranks. The mean over ranks that DDP
and DeepSpeed take is then the gradient that one process would compute on the whole batch.

All functions here are collectives: every rank of the group calls them, in the same order, also with an empty
shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .contrastive.arguments import FEATURE_DTYPES


@dataclass(frozen=True)
class Shards:
    """How the rows of one tensor lie over the ranks of a group.

    Attributes:
        sizes: rows of each rank, in rank order.
        rank: this process' rank in the group.
        group: the process group; None when all rows are here.
        differentiable: whether any rank wants the gradient of its rows.
    """

    sizes: tuple[int, ...]
    rank: int = 0
    group: dist.ProcessGroup | None = None
    differentiable: bool = False

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def start(self) -> int:
        """Position of this rank's first row among all rows."""
        return sum(self.sizes[: self.rank])

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    def weight(self, reduction: str) -> float:
        """What the sum of this rank's terms is multiplied with to give its share L_r: W / N_global, or W for "sum".

        An operator that takes the weight itself sees an upstream gradient of exactly 1.
        """
        # Without any row the sum is 0, and `global_mean` makes it NaN.
        return self.world_size / max(1, self.total) if reduction == "mean" else float(self.world_size)


def find_group(group: dist.ProcessGroup | None, world_size: int, rank: int) -> dist.ProcessGroup | None:
    """The group a loss runs over: the given one, the default one if `world_size` > 1; None where that is one process.

    Raises:
        RuntimeError: world_size > 1 and torch.distributed is not initialised.
        ValueError: world_size or rank contradict the group.
    """
    if group is None and world_size == 1:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"the loss was made for world_size={world_size}, but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group first"
        )
    found = group if group is not None else dist.group.WORLD
    actual = (dist.get_world_size(found), dist.get_rank(found))
    if actual[1] < 0:
        raise ValueError("this process is not in the group that the loss was made for")
    if world_size > 1 and (world_size, rank) != actual:
        raise ValueError(
            f"the loss was made with world_size={world_size}, rank={rank}, but the process group has "
            f"world_size={actual[0]}, rank={actual[1]} here: pass those, or group= alone"
        )
    return found if actual[0] > 1 else None


@overload
def gather(*tensors: Tensor, group: dist.ProcessGroup | None) -> tuple[Shards, tuple[Tensor, ...]]: ...
@overload
def gather(*tensors: Tensor | None, group: dist.ProcessGroup | None) -> tuple[Shards, tuple[Tensor | None, ...]]: ...
def gather(*tensors: Tensor | None, group: dist.ProcessGroup | None) -> tuple[Shards, tuple[Tensor | None, ...]]:
    """All ranks' rows of each tensor: [n_r, D] -> [N_global, D], in rank order, with the exact gradient.

    The backward sums the gradients of a row over all ranks and hands each rank its own rows. 16-bit features
    travel as they are; their gradients are summed in float32 and rounded once.

    Args:
        tensors: float tensors [n_r, D], not all of one length; a None, on every rank, stays None.
        group: the process group; None leaves the tensors as they are.

    Returns:
        (how the rows of the first tensor lie over the ranks, the gathered tensors).

    Raises:
        ValueError: on every rank, if ranks disagree on the width or the dtype of a tensor.
    """
    if group is None:
        return Shards((next(t.shape[0] for t in tensors if t is not None),)), tensors
    shards = [layout for layout in _gather_shards(*tensors, group=group) if layout is not None]
    present = [tensor for tensor in tensors if tensor is not None]
    # A rank whose shard needs no gradient (an empty one, say) must still answer the others in the backward.
    attached = [
        tensor.detach().requires_grad_() if layout.differentiable and not tensor.requires_grad else tensor
        for tensor, layout in zip(present, shards, strict=True)
    ]
    gathered = iter(_GatherRows.apply(shards, *attached))
    return shards[0], tuple([None if tensor is None else next(gathered) for tensor in tensors])


def gather_tokens(
    tokens: Tensor, mask: Tensor | None, *, group: dist.ProcessGroup | None
) -> tuple[Shards, Tensor, Tensor | None]:
    """All ranks' sets of tokens, padded to the longest rank's: [n_r, L_r, D] -> [N_global, L, D], as `gather` gives rows.

    Args:
        tokens: [n_r, L_r, D]; ranks may differ in n_r and L_r.
        mask: bool [n_r, L_r], True for tokens that count, or None for all; on some ranks it may be None.
        group: the process group; None leaves both as they are.

    Returns:
        (how the sets lie over the ranks, tokens [N_global, L, D], mask bool [N_global, L], None if all count).

    Raises:
        ValueError: on every rank, if ranks disagree on the width or the dtype of their tokens.
    """
    if group is None:
        return Shards((tokens.shape[0],)), tokens, mask
    count, length, width = tokens.shape
    table = _exchange([length, width, int(mask is not None)], group, tokens.device)
    lengths, widths, masked = zip(*table, strict=True)
    if len(set(widths)) > 1:
        raise ValueError(
            f"tokens differ between ranks (widths by rank: {list(widths)}): every rank must pass one width"
        )
    longest = max(lengths)
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, longest - length))
    shards, (rows,) = gather(padded.reshape(count, longest * width), group=group)
    everyone = rows.view(shards.total, longest, width)
    if not any(masked) and min(lengths) == longest:
        return shards, everyone, None
    counts = tokens.new_zeros(count, longest, dtype=torch.uint8)
    counts[:, :length] = 1 if mask is None else mask
    return shards, everyone, _all_gather(counts, shards).bool()


def _gather_shards(*tensors: Tensor | None, group: dist.ProcessGroup) -> list[Shards | None]:
    """Agree on how the rows of each tensor lie over the ranks: one small exchange for all of them."""
    mine = [number for tensor in tensors for number in _description(tensor)]
    table = _exchange(mine, group, next(t.device for t in tensors if t is not None))
    shards: list[Shards | None] = []
    for first in range(0, len(mine), 4):
        rows, widths, dtypes, wanted = zip(*(row[first : first + 4] for row in table), strict=True)
        if len(set(zip(widths, dtypes, strict=True))) > 1:
            listed = ", ".join(
                f"rank {rank}: " + ("none" if width < 0 else f"width {width}, {FEATURE_DTYPES[dtype]}")
                for rank, (width, dtype) in enumerate(zip(widths, dtypes, strict=True))
            )
            raise ValueError(f"features differ between ranks ({listed}): every rank must pass one width and dtype")
        shards.append(Shards(rows, dist.get_rank(group), group, any(wanted)) if widths[0] >= 0 else None)
    return shards


def _description(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Rows, width, dtype, and whether a gradient is wanted."""
    if tensor is None:
        return 0, -1, -1, 0
    return tensor.shape[0], tensor.shape[1], FEATURE_DTYPES.index(tensor.dtype), int(tensor.requires_grad)


def gather_ids(ids: Tensor, shards: Shards) -> Tensor:
    """All ranks' ids: int64 [n_r] -> [N_global], in rank order, of the rows that `shards` describes."""
    if shards.group is None:
        return ids
    return _all_gather(ids.unsqueeze(1), shards).squeeze(1)


def gather_counts(count: int, *, device: torch.device, group: dist.ProcessGroup | None) -> Shards:
    """`Shards` of rows that stay where they are, of which the other ranks learn the number alone."""
    if group is None:
        return Shards((count,))
    table = _exchange([count], group, device)
    return Shards(tuple(row[0] for row in table), dist.get_rank(group), group)


def _exchange(mine: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """The numbers of every rank, in rank order."""
    described = torch.tensor(mine, dtype=torch.int64, device=device)
    everyone = described.new_empty(dist.get_world_size(group), len(mine))
    dist.all_gather(list(everyone.unbind()), described, group=group)
    table: list[list[int]] = everyone.tolist()
    return table


class _GatherRows(torch.autograd.Function):
    """One node for all tensors, so that the backward's collectives have one order on every rank."""

    @staticmethod
    def forward(ctx: Any, shards: list[Shards], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shards = shards
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return tuple(_all_gather(tensor, layout) for tensor, layout in zip(tensors, shards, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        results = [
            _reduce_scatter(grad, layout).to(dtype) if layout.differentiable else None
            for grad, dtype, layout in zip(grads, ctx.dtypes, ctx.shards, strict=True)
        ]
        return None, *results


def _all_gather(rows: Tensor, shards: Shards) -> Tensor:
    longest = max(shards.sizes)
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: rows.shape[0]] = rows
    gathered = rows.new_empty(shards.world_size * longest, rows.shape[1])
    if gathered.numel():
        dist.all_gather_into_tensor(gathered, padded, group=shards.group)
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
        dist.reduce_scatter_tensor(own, padded, group=shards.group)
    return own[: shards.sizes[shards.rank]]


def global_mean(terms: Tensor, shards: Shards, *, reduction: str = "mean", local: bool = False) -> Tensor:
    """Reduce a loss's terms, one for each of this rank's rows, over the whole batch.

    With reduction="mean", L_r = W / N_global * sum(terms); with "sum", L_r = W * sum(terms).

    Args:
        terms: [n_r], differentiable; or a scalar, their sum times `shards.weight(reduction)`.
        shards: how the batch lies over the ranks.
        reduction: "mean" or "sum"; "none" returns the terms as they are.
        local: return L_r itself instead of the global value with the gradient of L_r.

    Returns:
        A scalar: L, the mean of L_r over ranks, bit for bit the same on every rank (or L_r). The mean over an
        empty batch is NaN, as everywhere in torch.
    """
    if reduction == "none":
        return terms
    share = terms.sum() * shards.weight(reduction) if terms.dim() else terms
    if reduction == "mean" and shards.total == 0:
        share = share + torch.nan
    if local or shards.group is None:
        return share
    result: Tensor = _MeanOverRanks.apply(share, shards)
    return result


class _MeanOverRanks(torch.autograd.Function):
    """Value: the mean over ranks. Gradient: that of this rank's own share (the trainer takes the mean)."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, shards: Shards) -> Tensor:
        mean = share.clone()
        dist.all_reduce(mean, group=shards.group)
        return mean / shards.world_size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
