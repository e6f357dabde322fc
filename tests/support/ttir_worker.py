"""Prints every 32-bit product of two runtime numbers in the kernels' first intermediate code, as JSON by kernel.

Its own process, without TRITON_INTERPRET: an interpreted kernel cannot be compiled. No GPU is needed.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton_tokens import TOKEN_CALLS, TOKEN_WAYS

from pairtile.kernels import backends, use_backend
from pairtile.kernels.contrastive.triton_kernels import launching
from triton_late import LATE_CALLS, LATE_WAYS
from triton_requests import REQUESTS, request_case, run_request


class _Driver:
    """As much of a driver as the compiler asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _FirstStageDone(Exception):
    pass


@triton.jit
def planted(out, row, stride, WIDE: tl.constexpr):
    """A product of two sizes as the address of a store: what this search is there to find, unless it has 64 bits."""
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out + row * stride, 1.0)


def first_stage(kernel: Any, arguments: dict[str, Any]) -> str:
    """The kernel's code as Triton's own dialect has it, after inlining and folding of constants."""
    found: list[str] = []
    make = CUDABackend.make_ttir

    def stop_after(module: Any, *rest: Any) -> Any:
        found.append(str(make(module, *rest)))
        raise _FirstStageDone

    CUDABackend.make_ttir = staticmethod(stop_after)
    try:
        kernel.warmup(**arguments, grid=(1,))
    except _FirstStageDone:
        pass
    finally:
        CUDABackend.make_ttir = staticmethod(make)
    return found[0]


def narrow_products(code: str) -> list[str]:
    """The multiplications of 32-bit integers, or of tensors of them, neither of whose factors is small: a constant, or
    the index of a lane within its tile."""
    small = set(re.findall(r"(%\S+) = (?:arith\.constant|tt\.make_range)", code))
    for _ in range(4):  # these, spread over a tensor or reshaped
        small |= {
            name
            for name, source in re.findall(r"(%\S+) = tt\.(?:splat|expand_dims|broadcast) (%[\w.]+)", code)
            if source in small
        }
    products = re.findall(r"arith\.muli (%[\w.]+), (%[\w.]+) : (\S*i32\S*)", code)
    return [f"{a} * {b} : {kind}" for a, b, kind in products if a not in small and b not in small]


def main() -> None:
    triton.runtime.driver.set_active(_Driver())
    triton.knobs.compilation.always_compile = True  # what lies in the cache has no first stage to look into
    found = {
        name: narrow_products(first_stage(planted, {"out": torch.empty(1), "row": 5, "stride": 7, "WIDE": wide}))
        for name, wide in (("planted", False), ("planted, wide", True))
    }
    codes: dict[str, set[str]] = {}

    def compile_only(kernel: Any, grid: tuple[int, ...], config: Any, arguments: dict[str, Any]) -> None:
        # The smallest configuration: addresses do not depend on it.
        tile = {} if config is None else {"BM": 64, "BN": 64, "BK": 16, "GROUP": 8}
        products = narrow_products(first_stage(kernel, arguments | tile))
        codes.setdefault(kernel.__name__, set()).update(products)

    backends._interpreting = lambda: True  # CPU tensors may be given: nothing runs
    launching.run = compile_only
    # What no kernel stores is read by the host: as keys of the largest scores, -1 is the first pair of each.
    launching.empty = lambda *shape, dtype, device: torch.full(shape, -1, dtype=dtype, device=device)
    launching.architecture = lambda device: "sm80"  # pointers: a descriptor's addresses are the hardware's
    for request in REQUESTS:
        # Sizes that no specialisation turns into constants, and several panels, so that totals are continued.
        case = request_case(request, 150, 270, 9, torch.float32, aligned=False)
        case.budget = 1
        with use_backend("triton"):
            run_request(case)
    for name in LATE_WAYS:
        with use_backend("triton"):
            LATE_CALLS[name]()
    for name in TOKEN_WAYS:
        with use_backend("triton"):
            TOKEN_CALLS[name]()
    json.dump(found | {name: sorted(products) for name, products in codes.items()}, sys.stdout)


if __name__ == "__main__":
    main()
