"""Which implementation serves an operator: the device decides, a person may overrule it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .build import built_library, missing_tool, operators_obstacle, warn_of, warn_once

#: What each backend is, in the order in which `info()` lists them.
BACKENDS = {
    "reference": "the formula, dense, in plain autograd: the oracle of the tests",
    "torch": "chunked PyTorch: never more than one block of logits in memory, no compiler needed",
    "cpp": "C++ for the CPU, compiled for this machine on first use; float64 inputs are served by torch",
    "triton": "Triton kernels for GPUs; float64 inputs are served by torch",
}

_ENVIRONMENT = "PAIRTILE_BACKEND"
_chosen: ContextVar[str | None] = ContextVar("pairtile_backend", default=None)


def _checked(name: str, given_by: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{given_by}: no backend {name!r}; available here: {', '.join(BACKENDS)}")
    if name == "cpp" and (obstacle := _operators_obstacle()) is not None:
        raise RuntimeError(
            f'{given_by} asks for the backend "cpp", but pairtile\'s C++ operators {obstacle}. Leave the choice open, '
            'or ask for "torch"'
        )
    if name == "triton" and (obstacle := _triton_obstacle()) is not None:
        raise RuntimeError(f'{given_by} asks for the backend "triton", but {obstacle}. Ask for "torch" instead')
    return name


def _operators_obstacle() -> str | None:
    return operators_obstacle()


def _cpu_default() -> str:
    obstacle = operators_obstacle()
    if obstacle is None:
        return "cpp"
    warn_of(obstacle)
    return "torch"


def _triton_obstacle() -> str | None:
    """Why the Triton kernels cannot be had at all, or None. Imports nothing: triton takes a second."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    return None


def _gpu_default(index: int | None) -> str:
    obstacle = _triton_obstacle()
    if obstacle is None and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(index)
        if capability < (8, 0):
            obstacle = (
                f"the Triton kernels need compute capability 8.0 and this GPU has {capability[0]}.{capability[1]}"
            )
    if obstacle is None:
        return "triton"
    warn_once(f"The torch backend serves on the GPU, which is slower, because {obstacle}")
    return "torch"


def _interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


# What torch.compiler.assume_constant_result does, without its import of the whole compiler: torch.compile runs
# these while it traces, instead of tracing a build.
_operators_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cpu_default._dynamo_marked_constant = True  # type: ignore[attr-defined]
_triton_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]
_gpu_default._dynamo_marked_constant = True  # type: ignore[attr-defined]
_interpreting._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator called inside the block by one backend.

    Blocks nest, the innermost wins, and each thread or asyncio task has its own choice. An operator keeps the
    backend of its forward for its backward, also when that runs after the block. Activation checkpointing runs
    the forward a second time, in the backward: that choice is taken anew, so the backward belongs in the block too.

    Args:
        name: "triton", "cpp", "torch" or "reference".

    Raises:
        ValueError: no such backend.
        RuntimeError: "cpp" on a machine that cannot build it, "triton" where that package is not installed.
    """
    token = _chosen.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def _default(device: torch.device) -> str:
    if device.type == "cpu":
        return _cpu_default()
    return _gpu_default(device.index) if device.type == "cuda" else "torch"


def select_backend(device: torch.device) -> tuple[str, str]:
    """The backend that serves tensors on `device` now, and the reason.

    The order is `use_backend`, then the environment variable PAIRTILE_BACKEND, then the device's default: on the
    CPU that is `cpp`, compiled now if it is not yet, on a GPU (CUDA or ROCm) `triton`; or, after one warning, `torch`
    where that cannot be.

    Raises:
        ValueError: PAIRTILE_BACKEND names no backend, or the backend chosen does not serve this device.
        RuntimeError: PAIRTILE_BACKEND=cpp on a machine that cannot build it, or =triton without that package.
    """
    chosen, given_by = _chosen.get(), "use_backend"
    if chosen is None and (named := os.environ.get(_ENVIRONMENT)):
        chosen, given_by = named, _ENVIRONMENT
    if chosen is None:
        return _default(device), f"default for {device.type}"
    if chosen == "cpp" and device.type != "cpu":
        raise ValueError(
            f'{given_by} asks for the backend "cpp", which serves the CPU alone, but tensors are on {device.type}'
        )
    if chosen == "triton" and device.type != "cuda" and not _interpreting():
        raise ValueError(
            f'{given_by} asks for the backend "triton", which serves GPUs, but tensors are on {device.type}. Move them, '
            "or set TRITON_INTERPRET=1 before the start to run the kernels in Triton's interpreter, which is for tests"
        )
    # use_backend has checked its own; that of the environment may be built only now.
    return (_checked(chosen, given_by) if given_by == _ENVIRONMENT else chosen), given_by


def expected_backend(device: torch.device) -> tuple[str, str]:
    """As `select_backend`, without compiling anything: what would serve, and the reason."""
    named = _chosen.get() or os.environ.get(_ENVIRONMENT) or ("cpp" if device.type == "cpu" else "torch")
    if named == "cpp" and device.type == "cpu" and built_library() is None and missing_tool() is None:
        return "cpp", f"for {device.type}; compiled on first use"
    try:
        return select_backend(device)
    except (RuntimeError, ValueError) as error:
        return "none", str(error)
