"""What the results were measured on, and the folder that they go to."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..peers import PEERS

RESULTS = Path(__file__).resolve().parents[1] / "results"

_DISTRIBUTIONS = ("pairtile", "torch", "triton", *(peer.distribution for peer in PEERS.values()))
_SMI = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "power.draw",
    "temperature.gpu",
    "pstate",
)


def environment() -> dict[str, Any]:
    """The device, its driver and its clocks now, and versions; None for what is not there."""
    found: dict[str, Any] = {
        "time": datetime.now().isoformat(timespec="seconds"),
        "device": None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _DISTRIBUTIONS},
        "nvidia-smi": None,
    }
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        found["device"] = {
            "name": properties.name,
            "capability": ".".join(str(part) for part in torch.cuda.get_device_capability(index)),
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": getattr(properties, "L2_cache_size", None),
        }
        # nvidia-smi counts all devices, torch those of CUDA_VISIBLE_DEVICES; the UUID is one and the same.
        found["nvidia-smi"] = _smi(str(getattr(properties, "uuid", index)))
    return found


def folder(device: str, now: datetime) -> Path:
    """benchmarks/results/gpu-<device>-<date>, e.g. gpu-nvidia-h100-80gb-hbm3-20260101-120000."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / f"gpu-{name}-{now:%Y%m%d-%H%M%S}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _smi(device: str) -> dict[str, str] | None:
    device = device if device.isdigit() or device.startswith("GPU-") else f"GPU-{device}"
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_SMI, values)) if len(values) == len(_SMI) else None
