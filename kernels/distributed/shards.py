"""How the rows of a tensor lie over the ranks of a group."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

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


def all_numbers(mine: list[int], group: dist.ProcessGroup, device: torch.device, said: str = "") -> list[list[int]]:
    """The numbers of every rank, in rank order.

    Whatever ranks do next hangs, or mixes up what arrives, where they do not do the same: so they say what that is.

    Args:
        mine: this rank's numbers, as many as the other ranks'.
        said: in words, what must be the same on all ranks.

    Raises:
        ValueError: on every rank, if ranks say different things.
    """
    words = said.encode()
    # All such exchanges are of one size, so that two that do not belong together meet, and see that they do not.
    message = [zlib.crc32(words), len(mine), len(words), *mine]
    head = _of_every_rank((message + [0] * _HEAD)[:_HEAD], torch.int64, group, device)
    if any(row[:2] != head[0][:2] for row in head):
        longest = max(row[2] for row in head)
        texts = _of_every_rank([*words, *[0] * (longest - len(words))], torch.uint8, group, device)
        raise ValueError(_disagreement([bytes(row).rstrip(b"\0").decode() for row in texts]))
    rest = _of_every_rank(message[_HEAD:], torch.int64, group, device) if len(message) > _HEAD else [[]] * len(head)
    return [(first[3:] + more)[: len(mine)] for first, more in zip(head, rest, strict=True)]


#: Numbers of the message that every agreement begins with, more than almost all of them need.
_HEAD = 32
AGREEMENT_BYTES = 8 * _HEAD


def _of_every_rank(
    mine: list[int], dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device
) -> list[list[int]]:
    described = torch.tensor(mine, dtype=dtype, device=device)
    everyone = described.new_empty(dist.get_world_size(group), len(mine))
    record("agreement", (len(everyone) - 1) * described.nbytes)
    dist.all_gather(list(everyone.unbind()), described, group=group)
    table: list[list[int]] = everyone.tolist()
    return table


def _disagreement(texts: list[str]) -> str:
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        by_text.setdefault(text, []).append(rank)
    listed = "; ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {text or 'another exchange'}"
        for text, ranks in by_text.items()
    )
    return (
        f"ranks differ ({listed}): every rank of the group must make the same calls in the same order, with features of "
        "one width and dtype, the same kinds of arguments and the same options"
    )


def check_recording(recording: Sequence[int], wanted: Sequence[bool]) -> None:
    """Raise, on every rank, if one of them will wait in the backward for another that has none.

    Args:
        recording: of each rank, whether autograd records there.
        wanted: whether any rank wants a gradient of each tensor.
    """
    if any(wanted) and not all(recording):
        without = [rank for rank, each in enumerate(recording) if not each]
        raise ValueError(
            f"gradients are disabled on ranks {without} and wanted on others, whose backward would wait for them: call "
            "the loss on all ranks inside torch.no_grad(), or on none"
        )


def agreed_shards(*tensors: Tensor | None, group: dist.ProcessGroup, said: str = "features") -> list[Shards | None]:
    """Agree on how the rows of each tensor lie over the ranks: one small exchange for all of them.

    Args:
        said: what the ranks gather, and how.
    """
    kinds = ", ".join(
        "none" if tensor is None else f"width {tensor.shape[1]} {tensor.dtype}".replace("torch.", "")
        for tensor in tensors
    )
    present = [tensor for tensor in tensors if tensor is not None]
    records = torch.is_grad_enabled()
    mine = [int(records), *(number for each in present for number in (len(each), int(records and each.requires_grad)))]
    recording, *columns = zip(*all_numbers(mine, group, present[0].device, f"{said}: {kinds}"), strict=True)
    wanted = [any(each) for each in columns[1::2]]
    check_recording(recording, wanted)
    rank = dist.get_rank(group)
    found = iter([Shards(rows, rank, group, want) for rows, want in zip(columns[::2], wanted, strict=True)])
    return [None if tensor is None else next(found) for tensor in tensors]
