"""The k largest scores of each owner on the Triton backend: what the tiles kept, panel by panel.

`triton_kernels/chosen.py` stores scores and indices as int64 keys, all different, that sort as the results are to: by
score, and among equal ones by index. So their order does not depend on how torch breaks ties.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_kernels.chosen import PICKED
from .triton_kernels.launches import Launches

# Bytes of a key, and as many again for what `topk` keeps of them.
_KEY = 16


class Largest:
    """The k largest scores of every owner, of `partners` each."""

    def __init__(self, k: int, dim: int, owners: int, partners: int, launches: Launches) -> None:
        self._k, self._dim, self._owners, self._launches = k, dim, owners, launches
        self._count = min(k, partners)
        self._found: list[Tensor] = []

    @property
    def _all(self) -> bool:
        """Whether a tile's scores are kept without a choice."""
        return self._k > PICKED

    def per_row(self, tiles: float, block: int) -> float:
        """Bytes in each row of a panel of so many tiles, `block` scores long along the reduced axis."""
        return _KEY * tiles * (block if self._all else self._k)

    def buffer(self, rows: int, m: int, tiles: int, block: int) -> Tensor:
        """Where the tiles of a panel store their keys, see `store_rows` and `store_cols`."""
        kept = self._k * tiles
        shape = (rows, m) if self._all else (rows, kept) if self._dim == 1 else (kept, m)
        return self._launches.empty(*shape, dtype=torch.int64)

    def add(self, keys: Tensor) -> None:
        """The keys of another panel: of its own rows, or of all columns."""
        if self._dim == 1:
            self._found.append(_top(keys, self._count))
        else:
            best = _top(keys.T, self._count)
            self._found = [best if not self._found else _top(torch.cat([*self._found, best], 1), self._count)]

    def results(self) -> list[Tensor]:
        """Scores, float32, and indices, int64, [owners, k]; -inf and -1 where there are fewer."""
        device = self._launches.device
        if not self._found:
            missing = torch.full((self._owners, self._k), -math.inf, device=device)
            return [missing, torch.full(missing.shape, -1, dtype=torch.int64, device=device)]
        keys = torch.cat(self._found)
        ranks = (keys >> 32).to(torch.int32)
        scores = (ranks ^ ((ranks >> 31) & 0x7FFFFFFF)).view(torch.float32)
        indices = (0xFFFFFFFF - (keys & 0xFFFFFFFF)).masked_fill(scores == -math.inf, -1)
        more = (0, self._k - keys.shape[1])
        return [F.pad(scores, more, value=-math.inf), F.pad(indices, more, value=-1)]


def _top(keys: Tensor, count: int) -> Tensor:
    """The largest of each row, in order."""
    return keys.topk(min(count, keys.shape[1]), dim=1).values
