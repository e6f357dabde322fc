"""Which implementation serves an operator: the device decides, a person may overrule it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

#: What each backend is, in the order in which `info()` lists them.
BACKENDS = {
    "reference": "the formula, dense, in plain autograd: the oracle of the tests",
    "torch": "chunked PyTorch: never more than one block of logits in memory, no compiler needed",
}

_ENVIRONMENT = "PAIRTILE_BACKEND"
_chosen: ContextVar[str | None] = ContextVar("pairtile_backend", default=None)


def _checked(name: str, given_by: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{given_by}: no backend {name!r}; available here: {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator called inside the block by one backend.

    Blocks nest, the innermost wins, and each thread or asyncio task has its own choice. An operator keeps the
    backend of its forward for its backward, also when that runs after the block. Activation checkpointing runs
    the forward a second time, in the backward: that choice is taken anew, so the backward belongs in the block too.

    Args:
        name: "torch" or "reference".

    Raises:
        ValueError: no such backend.
    """
    token = _chosen.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def select_backend(device: torch.device) -> tuple[str, str]:
    """The backend that serves tensors on `device` now, and the reason.

    The order is `use_backend`, then the environment variable PAIRTILE_BACKEND, then the device's default.

    Raises:
        ValueError: PAIRTILE_BACKEND names no backend.
    """
    chosen = _chosen.get()
    if chosen is not None:
        return chosen, "use_backend"
    from_environment = os.environ.get(_ENVIRONMENT)
    if from_environment:
        return _checked(from_environment, _ENVIRONMENT), _ENVIRONMENT
    return "torch", f"default for {device.type}"
