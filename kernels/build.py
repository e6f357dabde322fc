"""Compile `csrc/` for this machine, once, and keep the result.

A build lives in a directory of its own, named by everything that it depends on: torch's version, the sources,
the flags, the compiler and the processor (home directories are shared between unlike machines).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_LIBRARY = "pairtile_cpu"
_GUARD = ".exclusive_build"
# at::native::cpublas::brgemm(float): internal to ATen, so it is looked up before anything is compiled against it.
_BRGEMM_SYMBOL = b"_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"

_log = logging.getLogger(__name__)
_first_use = threading.RLock()


def cache_directory() -> Path:
    """Where builds are kept: PAIRTILE_CACHE, else TORCH_EXTENSIONS_DIR/pairtile, else the user's cache."""
    if own := os.environ.get("PAIRTILE_CACHE"):
        return Path(own)
    if extensions := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(extensions) / "pairtile"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairtile"


@contextlib.contextmanager
def exclusive_build(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Let one process at a time build extensions under `directory`, and clear what a killed one left behind.

    torch before 2.14 guards a build with a file named `lock` that simply exists; a process killed while
    building leaves it, and every later start waits for ever. The lock taken here is the kernel's (flock): it
    ends with its process. While it is held, any `lock` file below `directory` that no living process holds, and
    that lies in no directory of another exclusive build, is stale, and is removed. Not reentrant.

    Args:
        directory: a build directory, or a tree of them (TORCH_EXTENSIONS_DIR, for example); made if missing.

    Yields:
        The directory.
    """
    import fcntl  # here and not above: Windows has none, and the torch backend serves there too

    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / _GUARD, "a") as handle:
        if not _try_lock(handle.fileno()):
            _log.info("waiting for another process that builds in %s", root)
            fcntl.flock(handle, fcntl.LOCK_EX)
        for lock in root.rglob("lock"):
            inner = [parent for parent in lock.parents if root in parent.parents]
            if all(_is_free(parent / _GUARD) for parent in inner) and _is_free(lock):
                _log.info("removing the build lock %s, which no living process holds", lock)
                with contextlib.suppress(OSError):  # a tree that others own; torch waits there as it always did
                    lock.unlink()
        yield root


def _try_lock(descriptor: int) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(lock: Path) -> bool:
    # torch from 2.14 on locks its file, of the same name, with flock: held means alive.
    try:
        with open(lock) as handle:
            return _try_lock(handle.fileno())
    except FileNotFoundError:
        return True
    except OSError:  # a directory of that name, or another person's file: none of ours to judge
        return False


def sources() -> list[Path]:
    """The C++ sources of the CPU build: `csrc` lies beside this package, in the tree and in a wheel."""
    return sorted(_source_directory().glob("*.cpp"))


def _source_directory() -> Path:
    return Path(__file__).resolve().parent.parent / "csrc" / "cpu"


def compiler() -> str | None:
    """Path of the C++ compiler that a build would use (CXX, else c++), None if there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def missing_tool() -> str | None:
    """What a build lacks on this machine, in words; None if it has everything."""
    if compiler() is None:
        return f"no C++ compiler: {os.environ.get('CXX', 'c++')} is not on the PATH (install one, or set CXX)"
    if shutil.which("ninja", path=_search_path()) is None:
        return "no ninja: install it (pip install ninja)"
    if not sources():
        return "no sources: this installation lacks pairtile.csrc"
    return None


def _search_path() -> str:
    # A pip-installed ninja lies beside the interpreter, which is often not on the PATH.
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


@functools.cache
def _flags(compiler_path: str) -> tuple[str, ...]:
    """Compiler flags: the host's instruction set and OpenMP where the compiler knows them, and what torch offers."""
    flags = ["-O3"]
    native = next((each for each in ("-march=native", "-mcpu=native") if _accepts(compiler_path, each)), None)
    if native is not None:
        flags.append(native)
    # at::parallel_for is a template over OpenMP: in an extension compiled without, it runs on one thread.
    if _accepts(compiler_path, "-fopenmp"):
        flags.append("-fopenmp")
    if _torch_exports(_BRGEMM_SYMBOL):
        flags.append("-DPAIRTILE_BRGEMM")
    return tuple(flags)


def _accepts(compiler_path: str, flag: str) -> bool:
    # -E stops behind the preprocessor, which reads a header: clang knows -fopenmp where it has no omp.h.
    program = "#include <omp.h>\n" if flag == "-fopenmp" else ""
    trial = [compiler_path, flag, "-E", "-x", "c++", "-"]
    return subprocess.run(trial, input=program, capture_output=True, text=True, check=False).returncode == 0


@functools.cache
def _link_flags(flags: tuple[str, ...]) -> tuple[str, ...]:
    """The OpenMP runtime that torch itself loaded: a second one would not know torch.set_num_threads."""
    if "-fopenmp" not in flags:
        return ()
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return (str(own[0]),) if own else ("-fopenmp",)


def _torch_exports(symbol: bytes) -> bool:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        return False
    return hasattr(ctypes.CDLL(str(library)), symbol.decode())


def build_directory() -> Path:
    """The directory of the build that belongs to this torch, these sources, flags, compiler and processor."""
    compiler_path = compiler() or ""
    flags = _flags(compiler_path) if compiler_path else ()
    key = hashlib.sha256()
    for part in (torch.__version__, compiler_path, *flags, *_link_flags(flags), _processor()):
        key.update(part.encode() + b"\0")
    for source in [*sources(), *sorted(_source_directory().glob("*.h"))]:
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    return cache_directory() / f"{_LIBRARY}-torch{torch.__version__.split('+')[0]}-{key.hexdigest()[:16]}"


def _processor() -> str:
    """Architecture and instruction sets: a -march=native build must not be loaded by a lesser processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return platform.machine() + (flags.group(1) if flags else text)


def built_library() -> Path | None:
    """The finished shared library of this machine's build, if there is one. Compiles nothing."""
    library = build_directory() / f"{_LIBRARY}.so"
    return library if library.exists() else None


def load_library(library: Path) -> None:
    """Register the operators of a finished build as `torch.ops.pairtile`; again is harmless."""
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]


def build(*, verbose: bool = False) -> Path | None:
    """Compile the C++ operators for this machine, unless that is done, and load them; for GPUs, the CUDA operators too.

    Takes a minute or two the first time and milliseconds afterwards. Safe to call from several processes at once,
    and after one of them was killed in the middle. The first operator that runs on the CPU, or on a GPU, does the same.

    Args:
        verbose: show the compiler's commands and output.

    Returns:
        The shared library for the CPU; None, after one warning, if this machine cannot build it. The `torch` backend
        needs no build.
    """
    from .build_cuda import build_cuda, cuda_is_asked_for  # here, since that module asks this one in turn

    if cuda_is_asked_for():
        build_cuda(verbose=verbose)
    library, obstacle = _attempt(verbose)
    if obstacle is not None:
        warn_of(obstacle)
    return library


def _attempt(verbose: bool = False) -> tuple[Path | None, str | None]:
    """The loaded library, or what stood in the way."""
    library = built_library()
    if library is None and (lacking := missing_tool()) is not None:
        return None, f"are not built: {lacking}"
    try:
        library = library or _compile(verbose)
        load_library(library)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        # The compiler's last words are the ones that matter; its whole log can be thousands of lines.
        failed = "failed to build" if library is None else f"({library}) failed to load"
        return None, f"{failed}: {str(error)[-2000:]}"
    return library, None


@functools.cache
def operators_obstacle() -> str | None:
    """None once the C++ operators are loaded, which this call does, compiling them if need be; else why they are not.

    Tried once in a process: a failure is remembered like a success.
    """
    with _first_use:  # functools.cache lets two threads in
        return _load_operators()


def _load_operators() -> str | None:
    if built_library() is None and missing_tool() is None:
        _log.warning("compiling pairtile's C++ operators for this machine: a minute or two, once")
    _, obstacle = _attempt()
    if obstacle is not None:
        return obstacle
    if not hasattr(torch.ops.pairtile, "similarity_reduce"):
        return "lack similarity_reduce: this installation's csrc/ is not the one of its kernels/"
    from .contrastive.cpp_backend import register_fakes  # here, since that package asks this module in turn

    register_fakes()
    return None


def warn_of(obstacle: str) -> None:
    """Say once in a process that the torch backend serves instead of the C++ operators, and why."""
    warn_once(f"The torch backend serves on the CPU, because pairtile's C++ operators {obstacle}")


@functools.cache
def warn_once(message: str) -> None:
    """Warn, but of the same thing only once in a process."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _compile(verbose: bool) -> Path:
    flags = _flags(compiler() or "")
    return compile_library(
        _LIBRARY,
        build_directory(),
        sources(),
        verbose,
        extra_cflags=list(flags),
        extra_ldflags=list(_link_flags(flags)),
    )


def compile_library(name: str, into: Path, of: list[Path], verbose: bool, **options: Any) -> Path:
    """Compile sources into `into`/`name`.so, unless another process does it first.

    Args:
        name: of the library.
        into: the directory of this build, made if missing.
        of: the sources.
        verbose: show the compilers' commands and output.
        options: of torch.utils.cpp_extension.load.

    Raises:
        ImportError, OSError, RuntimeError, subprocess.SubprocessError: what is missing, or what the compilers say.
    """
    # Imported here: it needs setuptools, which a machine without compilers may not have either.
    from torch.utils import cpp_extension

    with exclusive_build(into) as directory:
        library = directory / f"{name}.so"
        if library.exists():  # another process built it while this one waited
            return library
        # Built beside and moved, so that a library that exists is a library that is whole.
        workspace = directory / "work"
        workspace.mkdir(exist_ok=True)
        path = os.environ.get("PATH")
        os.environ["PATH"] = _search_path()
        try:
            cpp_extension.load(
                name=name,
                sources=[str(source) for source in of],
                build_directory=str(workspace),
                is_python_module=False,
                verbose=verbose,
                **options,
            )
        finally:
            if path is None:
                del os.environ["PATH"]
            else:
                os.environ["PATH"] = path
        os.replace(workspace / f"{name}.so", library)
        shutil.rmtree(workspace, ignore_errors=True)
        return library
