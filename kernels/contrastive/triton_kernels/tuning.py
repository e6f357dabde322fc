"""Opt-in autotuning: time the configurations once, keep the fastest in a file, let every rank use the same.

    python -m pairtile.kernels.contrastive.triton_kernels.tuning --width 512 --dtype bfloat16

writes a file for this kind of GPU; `use_tuned()`, called by every rank at its start, makes the launches use it. Nothing is
timed during a run, and ranks never differ: other configurations add in another order, and give other last bits.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...build import cache_directory
from . import launching
from .configurations import ARCHITECTURES, KERNELS, PRECISIONS, Config, pick_config

#: From `_key` to the fields of a Config.
Table = dict[str, dict[str, int]]

_table: Table = {}


def chosen_config(
    arch: str, kernel: str, dtype: torch.dtype, width: int, precision: str, *, pressure: int = 0, **more: Any
) -> Config:
    """The tuned configuration where `use_tuned` was called and has one for this launch, else `pick_config`'s.

    Only the usual launches are tuned: aligned features, one field.
    """
    if _table and not pressure and more.get("aligned", True):
        fields = _table.get(_key(arch, kernel, dtype, width, precision))
        if fields is not None:
            return Config(**fields)
    return pick_config(arch, kernel, dtype, width, precision, pressure=pressure, **more)


def use_tuned(path: str | os.PathLike[str] | None = None, group: dist.ProcessGroup | None = None) -> None:
    """Launch with the configurations of a file from now on. In a process group a collective call: rank 0's file serves.

    Args:
        path: of the file; None: where the command line above writes it.
        group: whose first rank reads; the default group where there is one.

    Raises:
        FileNotFoundError: there is no such file, on every rank.
    """
    global _table
    grouped = dist.is_available() and dist.is_initialized()
    file = Path(path) if path is not None else default_path(torch.device("cuda"))
    content: list[Any] = [None]
    if not grouped or dist.get_rank(group) == 0:
        content = [_read(file)]
    if grouped:
        dist.broadcast_object_list(content, src=dist.get_global_rank(group, 0) if group is not None else 0, group=group)
    if content[0] is None:
        raise FileNotFoundError(f"no tuned configurations at {file}: run `python -m {__spec__.name}` there first")
    _table = content[0]


def forget_tuned() -> None:
    """Launch with the shipped configurations again."""
    global _table
    _table = {}


def default_path(device: torch.device) -> Path:
    """Where the configurations of this kind of GPU are kept, beside the C++ builds."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return cache_directory() / f"tuned-{name.replace(' ', '-')}.json"


def candidates(arch: str, kernel: str, dtype: torch.dtype, width: int, precision: str) -> list[Config]:
    """The shipped configuration first, then its neighbours: fewer columns, a stage more or less, other groups."""
    shipped = pick_config(arch, kernel, dtype, width, precision)
    found = {shipped: None}
    for block_n in (shipped.block_n, max(64, shipped.block_n // 2)):
        for stages in (shipped.num_stages, shipped.num_stages - 1, shipped.num_stages + 1):
            for group in (8, 4, 16):
                changed = {"block_n": block_n, "num_stages": max(2, stages), "group": group}
                found[Config(**asdict(shipped) | changed)] = None
    return list(found)


def fastest(configs: Iterable[Config], seconds: Callable[[Config], float]) -> Config:
    """The one that takes least; those that cannot be launched are left out, but the first, which ships, must work."""
    timed: list[tuple[float, int, Config]] = []
    for index, config in enumerate(configs):
        try:
            timed.append((seconds(config), index, config))
        except Exception:  # Triton's errors, out of shared memory for one, have no class in common
            if index == 0:
                raise
    return min(timed)[2]


def tune(
    dtype: torch.dtype, width: int, precision: str = "ieee", batch: int = 16_384, device: str = "cuda"
) -> dict[str, Config]:
    """The fastest configuration of each kernel, timed in the forward and backward of CLIP's loss."""
    arch = launching.architecture(torch.device(device))
    found: dict[str, Config] = {}
    for kernel in KERNELS:
        step = _training_step(dtype, width, precision, batch, device)
        measure = functools.partial(_seconds, step, _key(arch, kernel, dtype, width, precision))
        found[kernel] = fastest(candidates(arch, kernel, dtype, width, precision), measure)
    return found


def write(path: Path, arch: str, dtype: torch.dtype, width: int, precision: str, found: dict[str, Config]) -> None:
    """Add configurations to a file, in one step: who reads meanwhile sees the old file or the new one."""
    table = _read(path) or {}
    table |= {_key(arch, kernel, dtype, width, precision): asdict(config) for kernel, config in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True))
    partial.replace(path)


def _key(arch: str, kernel: str, dtype: torch.dtype, width: int, precision: str) -> str:
    assert arch in ARCHITECTURES
    # Widths that fill the same number of chunks of the inner dimension behave alike.
    chunks = -(-width // 64)
    return f"{arch} {kernel} {str(dtype).removeprefix('torch.')} {precision} {64 * chunks}"


def _read(path: Path) -> Table | None:
    if not path.is_file():
        return None
    table: Table = json.loads(path.read_text())
    return table


def _training_step(dtype: torch.dtype, width: int, precision: str, batch: int, device: str) -> Callable[[], None]:
    from ..operator import similarity_reduce
    from ..reductions import Diagonal, LogSumExp, PairScore

    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(2, batch, width, generator=generator, device=device)
    x, y = (torch.nn.functional.normalize(each, dim=-1).to(dtype).requires_grad_() for each in features)
    asked = (LogSumExp(exclude=Diagonal()), PairScore())

    def step() -> None:
        rows, cols = similarity_reduce(x, y, scale=20.0, rows=asked, cols=asked, precision=precision)
        torch.autograd.grad(torch.stack([others - own for others, own in (rows, cols)]).sum(), (x, y))

    return step


def _seconds(step: Callable[[], None], key: str, config: Config, calls: int = 5) -> float:
    """Median of a step with one kernel's configuration replaced."""
    global _table
    before, _table = _table, _table | {key: asdict(config)}
    try:
        step()  # compiles
        times: list[float] = []
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)
    finally:
        _table = before


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the Triton configurations of this GPU and keep the fastest.")
    parser.add_argument("--width", type=int, nargs="+", default=[512], help="D of the features (default: 512)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--precision", choices=PRECISIONS, default="ieee", help="of float32 features")
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--output", type=Path, help="the file (default: in pairtile's cache, by the name of the GPU)")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to time")
    device, dtype = torch.device("cuda"), getattr(torch, given.dtype)
    path = given.output or default_path(device)
    for width in given.width:
        found = tune(dtype, width, given.precision, given.batch)
        write(path, launching.architecture(device), dtype, width, given.precision, found)
        for kernel, config in found.items():
            print(f"{kernel:<8} width {width}: {config}")
    print(path)


if __name__ == "__main__":
    main()
