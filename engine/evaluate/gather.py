"""What evaluation exchanges between ranks: rows of tensors and plain metadata, without pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that evaluate together. With ``world_size`` 1 nothing is ever sent.

    ``group`` None means the default process group. All methods are collective: every rank calls them in the same
    order.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def _wire(self) -> torch.device:
        """NCCL moves GPU memory only; gloo gets host memory."""
        return self.device if dist.get_backend(self.group) == "nccl" else torch.device("cpu")

    def maximum(self, values: Sequence[int]) -> list[int]:
        """Element-wise maximum over the ranks."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self._wire)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def gather_rows(self, rows: Tensor) -> Tensor:
        """[n_r, D] of each rank -> [sum n_r, D] in rank order, on the CPU. n_r may be 0 (then D may be 0 too)."""
        if self.world_size == 1:
            return rows.cpu()
        width, most = self.maximum([rows.shape[1], len(rows)])
        counts = [torch.zeros(1, dtype=torch.int64, device=self._wire) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self._wire), group=self.group)
        # all_gather wants equal shapes: pad to the longest, cut after.
        padded = torch.zeros(most, width, dtype=rows.dtype, device=self._wire)
        padded[: len(rows), : rows.shape[1]] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[: int(count)].cpu() for part, count in zip(parts, counts)])

    def gather_json(self, value: Any) -> list[Any]:
        """One JSON value of each rank, in rank order."""
        if self.world_size == 1:
            return [value]
        text = bytearray(json.dumps(value).encode())
        rows = self.gather_rows(torch.frombuffer(text, dtype=torch.uint8).unsqueeze(1))
        lengths = self.gather_rows(torch.tensor([[len(text)]]))
        return [json.loads(part.numpy().tobytes()) for part in rows.split(lengths.flatten().tolist())]

    def from_first(self, value: Any) -> Any:
        """The first rank's JSON value on every rank."""
        return self.gather_json(value if self.rank == 0 else None)[0]
