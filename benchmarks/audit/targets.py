"""The GPUs that the audit compiles for: what they can do in a clock, and how to compile without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One GPU.

    Attributes:
        arch: the name by which `pick_config` knows it.
        shared_block, shared_sm: bytes of shared memory that one block may ask for, and that an SM has.
        matrix: what the names of its own matrix instructions begin with.
        tma: whether it has the tensor memory accelerator.
        flops: dense 16-bit FLOPs per SM and clock; tf32 runs at half of it.
        lanes: float32 FMAs per SM and clock.
    """

    arch: str
    gpu: str
    compiler: GPUTarget
    shared_block: int
    shared_sm: int
    matrix: str
    tma: bool = False
    flops: int = 0
    lanes: int = 0

    @property
    def nvidia(self) -> bool:
        return self.compiler.backend == "cuda"


#: Exponentials (lanes) and instructions (warps) per SM and clock, on each of the three NVIDIA generations.
MUFU_LANES, ISSUES = 16, 4
REGISTERS, THREADS, BLOCKS, TENSOR_COLUMNS = 65536, 2048, 32, 512

TARGETS = {
    each.arch: each
    for each in (
        Target("sm90", "H100", GPUTarget("cuda", 90, 32), 227 * KIB, 228 * KIB, "HGMMA", True, 4096, 128),
        Target("sm100", "B200", GPUTarget("cuda", 100, 32), 227 * KIB, 228 * KIB, "UTC", True, 8192, 128),
        Target("sm80", "A100", GPUTarget("cuda", 80, 32), 163 * KIB, 164 * KIB, "HMMA", False, 2048, 64),
        Target("gfx942", "MI300X", GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, "v_mfma"),
    )
}


class _Driver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device: each target is one of its own.
        return [each.compiler for each in TARGETS.values()].index(self._target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Within it, kernels compile for `target` whatever this machine has."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels made under it have no machine code; unset it and try again"
        )
    driver = triton.runtime.driver
    driver.set_active(_Driver(target.compiler))
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # no GPU here, and so no driver to go back to
            driver.reset_active()
