"""What pairtile finds on this machine: `python -m pairtile.kernels.info`."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import dataclass

import torch

from .backends import BACKENDS, expected_backend
from .build import built_library, compiler, load_library, missing_tool
from .build_cuda import built_cuda_library, cuda_is_asked_for, missing_cuda_tool

_DISTRIBUTIONS = ("pairtile", "torch", "triton", "flash-attn", "ninja", "deepspeed")


@dataclass(frozen=True)
class Info:
    """What was found; `str()` gives a readable page.

    Attributes:
        versions: of Python and of each package that matters here; None if it is not installed.
        platform: operating system and architecture.
        devices: name of each device that torch can use, by its torch name ("cpu", "cuda:0").
        compiler: path of the C++ compiler, None without one.
        extension: state of the C++ build: its path, or why there is none.
        cuda_extension: state of the CUDA build: its path, or why there is none.
        cpu_features: what the C++ build reports; empty as long as it is not built.
        backends: what each backend is.
        serves: for each device type, the backend that serves it now and the reason.
    """

    versions: dict[str, str | None]
    platform: str
    devices: dict[str, str]
    compiler: str | None
    extension: str
    cuda_extension: str
    cpu_features: dict[str, str]
    backends: dict[str, str]
    serves: dict[str, tuple[str, str]]

    def __str__(self) -> str:
        sections = {
            "versions": {name: version or "not installed" for name, version in self.versions.items()},
            "machine": {"platform": self.platform, **self.devices},
            "c++ build": {"compiler": self.compiler or "none found", "library": self.extension, **self.cpu_features},
            "cuda build": {"library": self.cuda_extension},
            "backends": self.backends,
            "served by": {device: f"{backend} ({reason})" for device, (backend, reason) in self.serves.items()},
        }
        lines = []
        for title, entries in sections.items():
            lines.append(title)
            lines += [f"  {name:<16} {value}" for name, value in entries.items()]
        return "\n".join(lines)


def info() -> Info:
    """Look at this machine. Compiles nothing; loads the C++ build if it exists."""
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    extension, cpu_features = _extension()
    return Info(
        versions={"python": platform.python_version(), **{name: _version(name) for name in _DISTRIBUTIONS}},
        platform=f"{platform.system()} {platform.machine()}",
        devices=devices,
        compiler=compiler(),
        extension=extension,
        cuda_extension=_cuda_extension(),
        cpu_features=cpu_features,
        backends=dict(BACKENDS),
        serves={kind: expected_backend(torch.device(kind)) for kind in {name.split(":")[0]: None for name in devices}},
    )


def _version(distribution: str) -> str | None:
    # From the metadata: importing triton or flash-attn to ask them takes seconds and may fail.
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution == "ninja" and shutil.which("ninja"):
            return "on the PATH"
        return None


def _extension() -> tuple[str, dict[str, str]]:
    library = built_library()
    if library is None:
        lacking = missing_tool()
        return (f"cannot be built: {lacking}" if lacking else "not built yet (pairtile.kernels.build() does it)"), {}
    try:
        load_library(library)
    except OSError as error:
        return f"{library} cannot be loaded: {error}", {}
    return str(library), dict(torch.ops.pairtile.cpu_features())


def _cuda_extension() -> str:
    if not cuda_is_asked_for():
        return "nothing to build for: no GPU, or PAIRTILE_CUDA says no"
    if (library := built_cuda_library()) is not None:
        return str(library)
    lacking = missing_cuda_tool()
    return f"cannot be built: {lacking}" if lacking else "not built yet (pairtile.kernels.build() does it)"


if __name__ == "__main__":
    print(info())
