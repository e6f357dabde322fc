"""The audit as JSON, for `pairtile report --audit FILE`: what the instructions of each phase allow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import triton

from .examine import Examined, label_of
from .launches import AnyRequest
from .peer_figures import PeerFigure
from .targets import Target
from .total import FLOPS, Total

Bound = dict[str, Any]


def of_totals(target: Target, request: AnyRequest, totals: Iterable[Total]) -> Iterator[Bound]:
    """All launches of each phase; where other launches serve large scores, both."""
    found = list(totals)
    for each in found:
        both = sum(other.phase == each.phase for other in found) > 1
        scores = ("small scores" if each.small_scores else "large scores") if both else ""
        yield _bound(target, request, each.phase, "pairtile", scores, each.share4, each.serial)


def of_kernels(target: Target, request: AnyRequest, examined: Sequence[Examined]) -> Iterator[Bound]:
    """Kernel by kernel, for requests whose launches are not added up."""
    seen = set()
    for each in examined:
        if each.usual is not None and each.work.flops and each.identity not in seen:
            seen.add(each.identity)
            shares = (each.usual.clocks["share4"], each.usual.clocks["serial"])
            yield _bound(target, request, each.launch.phase, "pairtile", label_of(each.launch), *shares)


def of_peers(target: Target, request: AnyRequest, peers: Iterable[PeerFigure]) -> Iterator[Bound]:
    """Of the FLOPs that the phase needs, whatever a peer counts itself."""
    for each in peers:
        fair = FLOPS[each.phase] / each.counted
        yield _bound(target, request, each.phase, each.library, each.kernel, each.share4 * fair, each.serial * fair)


def write(file: Path, bounds: Sequence[Bound]) -> None:
    document = {"date": datetime.now(timezone.utc).isoformat(), "triton": triton.__version__, "bounds": bounds}
    file.write_text(json.dumps(document, indent=1) + "\n")


def _bound(
    target: Target, request: AnyRequest, phase: str, library: str, kernel: str, share4: float, serial: float
) -> Bound:
    return {
        "arch": target.arch,
        "gpu": target.gpu,
        "request": str(request),
        "phase": phase,
        "library": library,
        "kernel": kernel,
        "share4": share4,
        "serial": serial,
    }
