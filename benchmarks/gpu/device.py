"""What a GPU measures: seconds by CUDA events with a cold L2 cache, peak memory, and the rates of the floor."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import triton

from ..floor import Floor
from ..harness import Call

#: (m, n, k) of the products whose best rate is the floor's: large, and none of the shapes that are measured.
MM_SHAPES = ((8192, 8192, 8192), (16384, 8192, 2048), (4096, 16384, 4096))
#: Calls of each of them, and of the copy, per sample; the best one counts.
_RATE_CALLS = 3
_COPY_BYTES = 2**29
#: At least; a larger L2 cache is flushed by twice its size.
_FLUSH_BYTES = 2**28
#: Contenders whose peak is a larger share of the memory push each other's blocks out of torch's allocator.
_LARGE_SHARE = 0.25


class Device(Protocol):
    """Where rows run. A test has one of its own, which needs no GPU.

    Attributes:
        name: for torch, e.g. "cuda".
        title: for people.
    """

    name: str
    title: str

    def synchronize(self) -> None:
        """Wait for all that was launched; raises what it ran into."""

    def free(self) -> None:
        """Give unused memory back."""

    def seconds(self, call: Call, calls: int = 1) -> float:
        """Of one call, on average: from its first kernel's launch to its last kernel's end, with a cold cache."""

    def host_seconds(self, call: Call) -> float:
        """Until a call returns to the host."""

    def peak_bytes(self, call: Call) -> int:
        """Most memory that a call had allocated at a time, beside what was allocated before."""

    def large(self, peak: int) -> bool:
        """Whether a call of this peak needs the memory that others have used, and hence a rehearsal."""

    def product_seconds(self, m: int, n: int, k: int, dtype: torch.dtype) -> float:
        """Of the fastest of a few calls of torch.mm."""

    def copy_rate(self) -> float:
        """Bytes per second of a large copy, read and written bytes both counted."""


def missing_device() -> str | None:
    """Why no row can run here; None if they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return "TRITON_INTERPRET is set: unset it" if triton.knobs.runtime.interpret else None


class CudaDevice:
    """Torch's current CUDA (or ROCm) device."""

    name = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.title = properties.name
        self._memory = properties.total_memory
        flush = max(_FLUSH_BYTES, 2 * getattr(properties, "L2_cache_size", 0))
        self._flush = torch.empty(flush, dtype=torch.uint8, device=self.name)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def seconds(self, call: Call, calls: int = 1) -> float:
        return sum(self._event_seconds(call) for _ in range(calls)) / calls

    def _event_seconds(self, function: Callable[[], object]) -> float:
        self._flush.zero_()
        self._start.record()
        function()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def host_seconds(self, call: Call) -> float:
        self.synchronize()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        self.synchronize()
        return seconds

    def peak_bytes(self, call: Call) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def large(self, peak: int) -> bool:
        return peak > _LARGE_SHARE * self._memory

    def product_seconds(self, m: int, n: int, k: int, dtype: torch.dtype) -> float:
        left, right = torch.randn(m, k, device=self.name).to(dtype), torch.randn(k, n, device=self.name).to(dtype)
        out = torch.empty(m, n, dtype=dtype, device=self.name)
        return self._best(lambda: torch.mm(left, right, out=out))

    def copy_rate(self) -> float:
        source, target = (torch.ones(_COPY_BYTES, dtype=torch.uint8, device=self.name) for _ in range(2))
        return 2 * _COPY_BYTES / self._best(lambda: target.copy_(source))

    def _best(self, function: Callable[[], object]) -> float:
        function()
        return min(self._event_seconds(function) for _ in range(_RATE_CALLS))


@dataclass
class FloorMeter:
    """Samples the device's rates before, between and after the rounds; `floor()` gives their medians.

    Args:
        device: whose.
        dtype: of the products' operands.
        source: as printed.
        shapes: (m, n, k) of the products; the best one is the sample.
    """

    device: Device
    dtype: torch.dtype
    source: str = "torch.mm"
    shapes: tuple[tuple[int, int, int], ...] = MM_SHAPES
    _rates: list[float] = field(default_factory=list)
    _bandwidths: list[float] = field(default_factory=list)

    def sample(self) -> None:
        self._rates.append(
            max(2 * m * n * k / self.device.product_seconds(m, n, k, self.dtype) for m, n, k in self.shapes)
        )
        self._bandwidths.append(self.device.copy_rate())

    def floor(self) -> Floor:
        return Floor.of(self._rates, self._bandwidths, self.source)


@contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """What torch.mm makes of float32 operands, and with it everything below that is not told otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
