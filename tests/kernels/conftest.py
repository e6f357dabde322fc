"""Shared by the kernel tests: the backends under test, random embeddings, and how an error is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile.kernels import use_backend

#: A new backend is added here and passes every test below it.
BACKENDS = ["reference", "torch"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


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
