"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is a folder ``checkpoints/step-00000100``. It is written under another name and renamed when it is
complete and on disk, so a folder of that name is always usable. It holds

- ``model.safetensors``, ``config.json``, ``tokenizer.json``: the model, float32, whatever the ZeRO stage; what
  ``pairtile.engine.load`` reads;
- ``state/``: DeepSpeed's own files, to resume from;
- ``trainer.json``: the step, the position in the data and what resuming has to agree with.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PairtileError
from .export import write_model_folder
from .runtime import Runtime

STATE = "state"


@dataclass
class TrainerState:
    """Where a run stands. ``batch_index`` counts contrastive batches, skipped ones included; ``seconds`` is spent in steps."""

    step: int = 0
    batch_index: int = 0
    seconds: float = 0.0
    bad_batches: int = 0
    best: float | None = None
    skipped_samples: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """What the files of a checkpoint depend on."""

    world_size: int
    zero_stage: int
    batch_size: int
    accumulation: int
    seed: int
    samples: int


def save_checkpoint(
    folder: Path,
    engine: Any,
    state: TrainerState,
    layout: Layout,
    runtime: Runtime,
    describe: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write ``folder/step-N`` atomically and remove all but the newest ``keep_last``. Every rank must call it.

    Args:
        engine: the DeepSpeed engine.
        describe: keyword arguments of :func:`write_model_folder` (model configuration, tokenizer, ...).
    """
    final = folder / f"step-{state.step:08d}"
    if (final / "trainer.json").is_file():
        return final
    partial = folder / f".partial-{state.step:08d}"
    if runtime.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    runtime.barrier()
    engine.save_checkpoint(str(partial), tag=STATE, save_latest=False)
    weights = full_state_dict(engine.module, runtime)
    if runtime.is_main:
        write_model_folder(partial, weights=weights, **describe)
        document = {"state": asdict(state), "layout": asdict(layout)}
        (partial / "trainer.json").write_text(json.dumps(document, indent=2))
    runtime.barrier()
    if runtime.is_main:
        _sync_tree(partial)
        os.replace(partial, final)
        _sync(folder)
        for old in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    runtime.barrier()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "trainer.json").is_file())


def read_trainer_state(checkpoint: Path) -> tuple[TrainerState, Layout]:
    document = json.loads((checkpoint / "trainer.json").read_text())
    return TrainerState(**document["state"]), Layout(**document["layout"])


def check_layout(checkpoint: Path, saved: Layout, now: Layout) -> None:
    """Refuse to continue with other data or another batch: the curve would silently be another one.

    Raises:
        PairtileError: naming the first key that differs.
    """
    names = {
        "batch_size": "train.batch_size",
        "accumulation": "train.accumulation",
        "seed": "train.seed",
        "samples": "number of training samples",
    }
    for key, name in names.items():
        before, after = getattr(saved, key), getattr(now, key)
        if before != after:
            raise PairtileError(
                f"cannot resume {checkpoint}: {name} was {before} and is {after} now; "
                "set it back, or start afresh with resume=never or another output"
            )


def load_checkpoint(checkpoint: Path, engine: Any) -> None:
    """Load parameters and optimiser state into the DeepSpeed engine. Every rank must call it."""
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=STATE)
    if loaded is None:
        raise PairtileError(
            f"DeepSpeed found nothing to load in {checkpoint}/{STATE}; remove that folder to go on from the one before"
        )


def full_state_dict(module: nn.Module, runtime: Runtime) -> dict[str, Tensor]:
    """The whole float32 state on rank 0 (empty elsewhere), gathered parameter by parameter under ZeRO-3."""
    import deepspeed

    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if runtime.is_main:
                state[name] = parameter.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    if runtime.is_main:
        persistent = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if name in persistent:
                state[name] = buffer.detach().cpu().clone(memory_format=torch.contiguous_format)
    return state


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder and put it in the place of ``target``; a kill leaves the old or the new one whole."""
    partial, old = (target.with_name(f".{target.name}.{word}") for word in ("partial", "old"))
    for left_over in (partial, old):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    _sync_tree(partial)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for directory, _, files in os.walk(folder):
        for name in files:
            _sync(Path(directory) / name)
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
