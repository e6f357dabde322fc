"""Whom we measure ourselves against, and what is there on this machine.

A new library is one entry of `PEERS`. Where it is not installed, its contenders stay in the table with the reason.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from pairtile import kernels
from pairtile.kernels.backends import BACKENDS
from pairtile.kernels.build import compiler, operators_obstacle


@dataclass(frozen=True)
class Peer:
    """A library: the module that is imported, what pip calls it, and how else it is installed if not by pip alone."""

    module: str
    distribution: str
    how: str | None = None


PEERS = {
    "open_clip": Peer("open_clip", "open_clip_torch"),
    "sentence-transformers": Peer("sentence_transformers", "sentence-transformers"),
    "maxsim-cpu": Peer("maxsim_cpu", "maxsim-cpu"),
    "fast-maxsim": Peer("fast_maxsim", "fast-maxsim"),
    "late-interaction-kernels": Peer("late_interaction_kernels", "late-interaction-kernels"),
    "flash-maxsim": Peer("flash_maxsim", "flash-maxsim"),
    "pylate": Peer("pylate", "pylate", "make peers"),
    # GPUs alone: benchmarks/gpu
    "memeff": Peer("memeff", "memeff"),
    "siglip-kernel": Peer("siglip_kernel", "siglip-kernel"),
    "inf-cl": Peer("inf_cl", "inf-cl"),
    "cut-cross-entropy": Peer("cut_cross_entropy", "cut-cross-entropy"),
    "liger-kernel": Peer("liger_kernel", "liger-kernel"),
}


def missing_peer(name: str) -> str | None:
    """Why a peer cannot take part; None if it can."""
    peer = PEERS[name]
    if importlib.util.find_spec(peer.module) is None:
        return f"not installed: {peer.how or f'pip install {peer.distribution}'}"
    return None


def missing_backend(name: str) -> str | None:
    """Why one of our own backends cannot take part; None if it can."""
    if name not in BACKENDS:
        return f"this version has no backend {name!r}"
    if name == "cpp" and (obstacle := operators_obstacle()) is not None:
        return f"the C++ operators {obstacle}"
    return None


def missing_compiler() -> str | None:
    """Why torch.compile cannot take part; None if it can: on the CPU it compiles C++."""
    return None if compiler() else "no C++ compiler on this machine"


def missing_kernel(name: str) -> str | None:
    """Why one of our own functions cannot take part; None if it can."""
    return None if hasattr(kernels, name) else f"this version has no {name}"
