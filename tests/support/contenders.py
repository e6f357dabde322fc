"""The backends that a random case is put to, and how their errors are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from pairtile.kernels.build import operators_obstacle

#: (floor, factor): an error may be as large as the floor, or the factor times the error of dense float32. Triton keeps
#: scores in base 2, which is one more rounding, of a score, than dense float32 has.
BOUNDS = {"torch": (2e-6, 2.0), "cpp": (2e-6, 2.0), "triton": (5e-6, 1.5)}
# Below this norm a truth counts as zero, and its error is absolute.
NEAR_ZERO = 1e-12


@contextmanager
def portable_product(portable: bool) -> Iterator[None]:
    """Let cpp multiply its tiles with its own loops instead of ATen's brgemm."""
    if not portable:
        yield
        return
    before = torch.ops.pairtile.use_portable_product(True)
    try:
        yield
    finally:
        torch.ops.pairtile.use_portable_product(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def contenders(interpreted: bool) -> list[tuple[str, bool]]:
    """(backend, whether cpp's portable tile product is used)."""
    built = [] if operators_obstacle() else [("cpp", False), ("cpp", True)]
    triton = [("triton", False)] if interpreted and find_spec("triton") is not None else []
    return [("torch", False), *built, *triton]


def relative_error(given: Tensor, truth: Tensor, size: float) -> float:
    """Norm of the difference over the norm of the truth, or over `size` if that is larger; infinities must agree."""
    given, truth = given.double(), truth.double()
    if not torch.equal(given.isinf(), truth.isinf()) or given.isnan().any():
        return float("inf")
    given, truth = given.masked_fill(given.isinf(), 0), truth.masked_fill(truth.isinf(), 0)
    return float((given - truth).norm()) / max(float(truth.norm()), size, NEAR_ZERO)
