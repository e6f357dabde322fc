"""Compile `csrc/cuda/` for the GPUs of this machine, once, and keep the result beside that of `csrc/cpu/`.

The operators that it holds take the place of Triton kernels on NVIDIA GPUs. Where it cannot be built these serve.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import subprocess
import threading
from pathlib import Path

import torch

from .build import cache_directory, compile_library, load_library, missing_tool, warn_once

_LIBRARY = "pairtile_cuda"
_ENVIRONMENT = "PAIRTILE_CUDA"
_ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"

_log = logging.getLogger(__name__)
_first_use = threading.RLock()


def cuda_sources() -> list[Path]:
    """The sources of the CUDA build, in the tree and in a wheel."""
    return sorted([*_source_directory().glob("*.cu"), *_source_directory().glob("*.cpp")])


def _source_directory() -> Path:
    return Path(__file__).resolve().parent.parent / "csrc" / "cuda"


def architectures() -> str:
    """What is compiled for: TORCH_CUDA_ARCH_LIST, else the GPUs at hand ("8.0;9.0"); empty if there is neither."""
    if named := os.environ.get(_ARCHITECTURES):
        return named
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def missing_cuda_tool() -> str | None:
    """What a CUDA build lacks on this machine, in words; None if it has everything."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if (lacking := missing_tool()) is not None:
        return lacking
    if not cuda_sources():
        return "no sources: this installation lacks pairtile.csrc"
    if not architectures():
        return f"no GPU is found, and {_ARCHITECTURES} names none"
    home = _toolkit()
    if home is None:
        return "no nvcc: install the CUDA toolkit, and set CUDA_HOME if nvcc is not on the PATH"
    if not (home / "include" / "cuda_runtime.h").exists():
        return f"{home} has nvcc and no include/cuda_runtime.h: set CUDA_HOME to the CUDA toolkit"
    version = _nvcc_version(str(home))
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"{home} is of CUDA {version or 'unknown'} and torch of {torch.version.cuda}: "
            "set CUDA_HOME to a toolkit of torch's major version"
        )
    return None


def _toolkit() -> Path | None:
    """Where torch will look for the toolkit. Imported here: cpp_extension needs setuptools."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    return Path(home) if home is not None and (Path(home) / "bin" / "nvcc").exists() else None


@functools.cache
def _nvcc_version(home: str) -> str:
    """ "13.0"; empty if nvcc does not tell."""
    told = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", told)
    return found.group(1) if found else ""


def cuda_build_directory() -> Path:
    """The directory of the build that belongs to this torch, these sources and GPUs.

    Not to the compilers: a build is found where they are no longer at hand, as in an image without the toolkit.
    """
    key = hashlib.sha256()
    for part in (torch.__version__, architectures()):
        key.update(part.encode() + b"\0")
    for source in [*cuda_sources(), *sorted(_source_directory().glob("*.h"))]:
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    return cache_directory() / f"{_LIBRARY}-torch{torch.__version__.split('+')[0]}-{key.hexdigest()[:16]}"


def built_cuda_library() -> Path | None:
    """The finished shared library for this machine's GPUs, if there is one. Compiles nothing."""
    library = cuda_build_directory() / f"{_LIBRARY}.so"
    return library if library.exists() else None


def build_cuda(*, verbose: bool = False) -> Path | None:
    """Compile the CUDA operators for the GPUs of this machine, unless that is done, and load them.

    Takes a minute the first time. The first operator that runs on a GPU and has a CUDA kernel does the same.
    TORCH_CUDA_ARCH_LIST ("8.0;9.0") chooses the architectures, also on a machine without a GPU.

    Args:
        verbose: show the compilers' commands and output.

    Returns:
        The shared library; None, after one warning, if it cannot be built. The Triton kernels need no build.
    """
    library, obstacle = _attempt(verbose)
    if obstacle is not None:
        _warn_of(obstacle)
    return library


def _attempt(verbose: bool = False) -> tuple[Path | None, str | None]:
    """The loaded library, or what stood in the way."""
    library = built_cuda_library()
    try:
        if library is None:
            if (lacking := missing_cuda_tool()) is not None:
                return None, f"are not built: {lacking}"
            _log.warning("compiling pairtile's CUDA operators for %s: a minute, once", architectures())
            library = compile_library(
                _LIBRARY,
                cuda_build_directory(),
                cuda_sources(),
                verbose,
                extra_cflags=["-O3"],
                extra_cuda_cflags=["-O3"],
                with_cuda=True,
            )
        load_library(library)
        _try_here()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        failed = "failed to build" if library is None else f"({library}) do not run here"
        return None, f"{failed}: {str(error)[-2000:]}"
    return library, None


def _try_here() -> None:
    """Raise unless the GPU at hand runs what was compiled: TORCH_CUDA_ARCH_LIST may name others alone."""
    if torch.cuda.is_available():
        best = torch.zeros(1, 1, device="cuda")
        torch.ops.pairtile.cuda_select_pairs(best, best.long(), 1, 0, 0, False, False)


def _warn_of(obstacle: str) -> None:
    warn_once(
        f"On NVIDIA GPUs Triton and torch do what pairtile's CUDA operators could, because these {obstacle}. "
        f"{_ENVIRONMENT}=0 says that they are not wanted"
    )


@functools.cache
def cuda_operators_obstacle() -> str | None:
    """None once the CUDA operators are loaded, which this call does, compiling them if need be; else why they are not.

    Tried once in a process: a failure is remembered like a success.
    """
    with _first_use:  # functools.cache lets two threads in
        return _attempt()[1]


def cuda_is_asked_for() -> bool:
    """Whether there are GPUs to compile for, or TORCH_CUDA_ARCH_LIST names some, and PAIRTILE_CUDA does not say no."""
    return _is_wanted() and architectures() != ""


def _is_wanted() -> bool:
    declined = os.environ.get(_ENVIRONMENT, "1").lower() in ("0", "false", "no", "off", "n")
    return torch.version.cuda is not None and not declined


def _cuda_operators_serve() -> bool:
    if not _is_wanted():
        return False
    if (obstacle := cuda_operators_obstacle()) is not None:
        _warn_of(obstacle)
    return obstacle is None


# As in backends.py: torch.compile runs this while it traces, instead of tracing a build.
_cuda_operators_serve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def with_cuda(backend: str, device: torch.device) -> str:
    """ "cuda" where CUDA operators, where there are any, take the place of the triton backend's; else the backend.

    That is on NVIDIA GPUs where they can be built; the environment variable PAIRTILE_CUDA=0 does without them.

    Args:
        backend: of `select_backend`.
        device: of the tensors.
    """
    return "cuda" if backend == "triton" and device.type == "cuda" and _cuda_operators_serve() else backend
