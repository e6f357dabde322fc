"""Shared by the kernel tests: the backends under test, random embeddings, and how an error is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile.kernels import use_backend
from pairtile.kernels.build import operators_obstacle

#: A new backend is added here and passes every test below it.
BACKENDS = ["reference", "torch", "cpp"]


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


@pytest.fixture
def dtype(backend: str) -> torch.dtype:
    """The widest dtype that the backend serves itself: cpp hands float64 to torch, which would prove nothing."""
    return torch.float32 if backend == "cpp" else torch.float64


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
