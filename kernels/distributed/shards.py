"""How the rows of a tensor lie over the ranks of a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..dtypes import FEATURE_DTYPES
from .traffic import record


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


def all_numbers(mine: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """The numbers of every rank, in rank order."""
    described = torch.tensor(mine, dtype=torch.int64, device=device)
    everyone = described.new_empty(dist.get_world_size(group), len(mine))
    record("agreement", (len(everyone) - 1) * described.nbytes)
    dist.all_gather(list(everyone.unbind()), described, group=group)
    table: list[list[int]] = everyone.tolist()
    return table


def agreed_shards(*tensors: Tensor | None, group: dist.ProcessGroup) -> list[Shards | None]:
    """Agree on how the rows of each tensor lie over the ranks: one small exchange for all of them."""
    mine = [number for tensor in tensors for number in _description(tensor)]
    table = all_numbers(mine, group, next(t.device for t in tensors if t is not None))
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
