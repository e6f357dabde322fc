"""The floor of a row: how fast this machine multiplies and copies, measured during the row's own rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .peers import missing_backend
from .work import Work

#: Tile shapes (m, n, k) of the micro-kernel that are tried; the best one is the rate.
TILES = ((64, 256, 512), (128, 128, 512), (32, 512, 512))
#: Edge of the product that stands in where there is no micro-kernel.
_MM_EDGE = 1024
#: Large enough that no cache holds source and target.
_COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Floor:
    """The machine's rates: medians of the samples taken before, between and after the rounds.

    Attributes:
        flops_per_second: of matrix products, all threads.
        bytes_per_second: of a copy, read and written bytes both counted; of a sum, if that is faster, for work that reads alone.
        source: what multiplied: "brgemm", "brgemm of float32" where it has no product of the dtype, or "torch.mm".
        rate_samples, bandwidth_samples: all samples, in the order in which they were taken.
    """

    flops_per_second: float
    bytes_per_second: float
    source: str
    rate_samples: tuple[float, ...]
    bandwidth_samples: tuple[float, ...]

    @classmethod
    def of(cls, rates: Sequence[float], bandwidths: Sequence[float], source: str) -> Floor:
        """The medians of the samples."""
        return cls(statistics.median(rates), statistics.median(bandwidths), source, tuple(rates), tuple(bandwidths))

    def seconds(self, work: Work) -> float:
        """No run of this work can be faster, whatever it overlaps."""
        return max(work.flops / self.flops_per_second, work.least_bytes / self.bytes_per_second)


@dataclass
class FloorMeter:
    """Takes samples of the two rates; `floor()` gives their medians.

    Args:
        dtype: of the products' operands.
        seconds: how long each tile shape and the copy run per sample.
        copy_bytes: size of the buffer that is copied.
        read_only: the bandwidth wanted is that of reading.
    """

    dtype: torch.dtype
    seconds: float = 0.1
    copy_bytes: int = _COPY_BYTES
    read_only: bool = False
    _rates: list[float] = field(default_factory=list)
    _bandwidths: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._product_dtype = self.dtype
        if missing_backend("cpp") is not None:
            self.source = "torch.mm"
        else:
            self.source = "brgemm"
            try:
                self._brgemm_rate(TILES[0], 0.0001)
            except RuntimeError:  # no tile product of this dtype on this machine: ours converts to float32, too
                self._product_dtype, self.source = torch.float32, "brgemm of float32"
        # ones and not empty: pages that were never written all map to one page of zeros
        self._copy = torch.ones(self.copy_bytes, dtype=torch.uint8), torch.ones(self.copy_bytes, dtype=torch.uint8)

    def sample(self) -> None:
        if self.source == "torch.mm":
            self._rates.append(_mm_rate(self.dtype, self.seconds))
        else:
            self._rates.append(max(self._brgemm_rate(tile, self.seconds) for tile in TILES))
        source, target = self._copy
        bandwidth = 2 * self.copy_bytes / _best_seconds(lambda: target.copy_(source), self.seconds)
        if self.read_only:
            words = source.view(torch.float32)
            bandwidth = max(bandwidth, self.copy_bytes / _best_seconds(words.sum, self.seconds))
        self._bandwidths.append(bandwidth)

    def _brgemm_rate(self, tile: tuple[int, int, int], seconds: float) -> float:
        return 1e9 * float(torch.ops.pairtile.brgemm_rate(self._product_dtype, *tile, seconds))

    def floor(self) -> Floor:
        return Floor.of(self._rates, self._bandwidths, self.source)


def _mm_rate(dtype: torch.dtype, seconds: float) -> float:
    left, right = (torch.randn(_MM_EDGE, _MM_EDGE).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * _MM_EDGE**3 / _best_seconds(lambda: torch.mm(left, right, out=out), seconds)


def _best_seconds(function: Callable[[], object], seconds: float) -> float:
    """The fastest of the calls that fit into `seconds`, two at least (the first one warms up)."""
    function()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
