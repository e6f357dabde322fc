"""How kernels are started: on which target, with which arguments. Every launch and every buffer goes through here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configurations import Config

# The smallest row stride and address that the tensor memory accelerator takes.
_TMA_BYTES = 16

# Blocks have at most 256 rows and as many columns; their offsets within a block take 32 bits.
_FARTHEST_STRIDE = 2**31 // 512


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which needs no GPU."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> str:
    """The configurations' name of the device; a newer one is served like the newest known that it can run."""
    if device.type != "cuda":
        return "sm90"  # interpreted, or compiled ahead of time by someone who says for what
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # 12.0, GeForce Blackwell, has the shared memory and the matrix instructions of sm_80's kind.
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised buffer; its own function so that a test can put guards around each."""
    return torch.empty(shape, dtype=dtype, device=device)


def run(kernel: Any, grid: tuple[int, ...], config: Config | None, arguments: dict[str, Any]) -> None:
    """Start `kernel` on the current device; a test may record, compile or check it instead."""
    options: dict[str, Any] = {}
    if config is not None:
        options = {
            "BM": config.block_m,
            "BN": config.block_n,
            "BK": config.block_k,
            "GROUP": config.group,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
    kernel[grid](**arguments, **options)


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Triton launches on torch's current device, which need not be where the tensors are."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


def vectorised(matrix: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes, and so can be loaded by as many at a time; expanded ones do not."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * matrix.element_size() % _TMA_BYTES == 0
        and matrix.data_ptr() % _TMA_BYTES == 0
    )


def aligned(matrix: Tensor, arch: str) -> bool:
    """Whether descriptors can load the matrix: the hardware has them, and its rows are aligned."""
    return arch in ("sm90", "sm100") and matrix.numel() > 0 and vectorised(matrix)


def near(matrix: Tensor) -> Tensor:
    """The matrix, or each of a batch of them, as its memory has it, or a contiguous copy where one block would reach over
    2^31 elements."""
    matrix = matrix.resolve_neg()
    return matrix if max(matrix.stride()[-2:], default=0) < _FARTHEST_STRIDE else matrix.contiguous()


def source(matrix: Tensor, block: tuple[int, int], tma: bool) -> Any:
    """What a kernel loads blocks of the matrix from: a descriptor, or the tensor itself, whose strides it is given."""
    return TensorDescriptor.from_tensor(matrix, list(block)) if tma else matrix


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
