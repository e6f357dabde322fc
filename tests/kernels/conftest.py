"""Shared by the kernel tests: the backends under test, random embeddings, and how an error is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_safety import gpu_safety  # noqa: F401  (a fixture)
from pairtile.kernels import use_backend
from pairtile.kernels.build import operators_obstacle
from triton_interpreter import spare_repeated_work

#: A new backend is added here and passes every test below it.
BACKENDS = ["reference", "torch", "cpp", "triton"]


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    if find_spec("triton") is not None:
        spare_repeated_work()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    _skip_what_is_not_built(request.param)
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def cpp() -> Iterator[None]:
    """The cpp backend alone."""
    _skip_what_is_not_built("cpp")
    with use_backend("cpp"):
        yield


def _skip_what_is_not_built(name: str) -> None:
    if name == "cpp" and (obstacle := operators_obstacle()) is not None:
        pytest.skip(f"pairtile's C++ operators {obstacle}")
    if name == "triton":
        pytest.importorskip("triton")


@pytest.fixture
def dtype(backend: str) -> torch.dtype:
    """The widest dtype that the backend serves itself: what hands float64 to torch would prove nothing by it."""
    return torch.float32 if backend in ("cpp", "triton") else torch.float64


@pytest.fixture
def some(backend: str) -> Callable[[Sequence], Sequence]:
    """Of several variants that take the same paths: all, but the last alone where the interpreter makes each slow."""
    return lambda variants: variants[-1:] if backend == "triton" else variants


@pytest.fixture
def embeddings() -> Callable[..., tuple[Tensor, Tensor]]:
    """Unit vectors x [n, d] and y [m, d] in float64; `cosine` aligns y_i with x_i."""

    def make(n: int, m: int, d: int, cosine: float | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)
        y = F.normalize(torch.randn(m, d, generator=generator, dtype=torch.float64), dim=-1)
        if cosine is not None:
            across = F.normalize(y - (x * y).sum(-1, keepdim=True) * x, dim=-1)
            y = cosine * x + (1 - cosine**2) ** 0.5 * across
        return x, y

    return make


@pytest.fixture
def relative_error() -> Callable[..., float]:
    """Norm of the difference over the norm of the truth (over `size`, if that is larger)."""

    def measure(given: Tensor, truth: Tensor, size: float = 0.0) -> float:
        given, truth = given.detach().double(), truth.detach().double()
        return ((given - truth).norm() / max(float(truth.norm()), size, 1e-30)).item()

    return measure
