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
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .errors import PairtileError
from .export import write_model_folder
from .recipe import ModelConfig
from .runtime import Runtime

STATE = "state"
UNIVERSAL = "universal"


@dataclass
class TrainerState:
    """Where a run stands. ``batch_index`` counts contrastive batches, skipped ones included; ``seconds`` is spent in steps."""

    step: int = 0
    batch_index: int = 0
    seconds: float = 0.0
    bad_batches: int = 0
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
    if is_complete(final):
        return final
    try:
        _write_checkpoint(folder, final, engine, state, layout, runtime, describe, keep_last)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PairtileError(
            f"cannot write {final}: {reason}; make room or set another output. The checkpoint before it is intact"
        ) from None
    return final


def _write_checkpoint(
    folder: Path,
    final: Path,
    engine: Any,
    state: TrainerState,
    layout: Layout,
    runtime: Runtime,
    describe: dict[str, Any],
    keep_last: int,
) -> None:
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
        remove_folder(final)  # left by a kill while it was being removed
        os.replace(partial, final)
        _sync(folder)
        for old in list_checkpoints(folder)[:-keep_last]:
            remove_folder(old)
    runtime.barrier()


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if is_complete(path))


def is_complete(checkpoint: Path) -> bool:
    return (checkpoint / "trainer.json").is_file()


def remove_folder(folder: Path) -> None:
    """Remove a folder under another name, so that a kill in between leaves nothing that looks whole."""
    if folder.exists():
        condemned = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(condemned, ignore_errors=True)
        os.replace(folder, condemned)
        shutil.rmtree(condemned, ignore_errors=True)


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


@dataclass(frozen=True)
class Source:
    """What a run starts from: nothing, or a checkpoint in DeepSpeed's form (``tag``: its sub-folder)."""

    state: TrainerState
    checkpoint: Path | None = None
    tag: str = STATE

    @property
    def universal(self) -> bool:
        return self.tag == UNIVERSAL


def find_source(run_dir: Path, now: Layout, model: ModelConfig, runtime: Runtime, *, resume: bool) -> Source:
    """The newest complete checkpoint, converted to DeepSpeed's universal form if ranks or ZeRO stage changed.

    Every rank must call it. Rank 0 removes what a killed run left half written, converts, and, without
    ``resume``, moves an earlier run in the same folder out of the way.

    Raises:
        PairtileError: the checkpoint belongs to another model, other data or another batch, or cannot be converted.
    """
    folder = run_dir / "checkpoints"
    if runtime.is_main:
        for pattern in (".partial-*", ".old-*"):
            for left_over in folder.glob(pattern):
                shutil.rmtree(left_over, ignore_errors=True)
        if not resume:
            _move_away(run_dir)
    runtime.barrier()
    found = list_checkpoints(folder)
    if not found:
        return Source(TrainerState())
    state, saved = read_trainer_state(found[-1])
    check_layout(found[-1], saved, now)
    check_model(found[-1], model)
    if saved.zero_stage == now.zero_stage and (saved.world_size == now.world_size or now.zero_stage == 0):
        return Source(state, found[-1])
    if not {saved.zero_stage, now.zero_stage} <= {1, 2}:
        # from ZeRO 3 the converted optimiser state is not quite the saved one (losses off by 1e-4, DeepSpeed 0.19.8)
        raise PairtileError(
            f"cannot resume {found[-1]}: it was written under ZeRO {saved.zero_stage} on {saved.world_size} ranks, and "
            f"now it is ZeRO {now.zero_stage} on {now.world_size}; DeepSpeed's universal checkpoint is exact for "
            f"ZeRO 1 and 2 alone. Set train.zero_stage={saved.zero_stage} and start {saved.world_size} ranks, or start "
            "afresh with resume=never"
        )
    if runtime.is_main:
        _convert(found[-1])
    runtime.barrier()
    return Source(state, found[-1], UNIVERSAL)


def _move_away(run_dir: Path) -> None:
    """Put an earlier run's results into ``previous-N``: a new one must neither mix with them nor destroy them."""
    kept = [path for path in run_dir.iterdir() if not path.name.startswith("previous-")]
    if (
        not any(list_checkpoints(path) for path in kept if path.name == "checkpoints")
        and not (run_dir / "best").exists()
    ):
        return
    number = 1 + sum(1 for _ in run_dir.glob("previous-*"))
    target = run_dir / f"previous-{number}"
    target.mkdir()
    for path in kept:
        os.replace(path, target / path.name)
    (run_dir / "checkpoints").mkdir()


def check_model(checkpoint: Path, now: ModelConfig) -> None:
    """Refuse to continue with another model. Raises :class:`PairtileError` naming the first key that differs."""
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model"]
    ignored = ("preset", "pretrained", "attention")  # they do not change what the weights mean
    for key, before, after in _differences(saved, now.model_dump(mode="json"), "model"):
        if key.rsplit(".", 1)[-1] not in ignored:
            raise PairtileError(
                f"cannot resume {checkpoint}: {key} was {before} and is {after} now; set it back, or start afresh with "
                "resume=never or another output"
            )


def _differences(before: Any, after: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            yield from _differences(before.get(name), after.get(name), f"{key}.{name}")
    elif before != after:
        yield key, before, after


def _convert(checkpoint: Path) -> None:
    """Write ``checkpoint/universal`` with DeepSpeed's converter, in a process of its own since it forks workers."""
    if (checkpoint / UNIVERSAL).is_dir():
        return
    partial = checkpoint / f"{UNIVERSAL}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / STATE), "--output_folder", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PairtileError(f"DeepSpeed could not convert {checkpoint} for other ranks or another ZeRO stage: {last}")
    os.replace(partial, checkpoint / UNIVERSAL)


def load_checkpoint(source: Source, engine: Any) -> None:
    """Load parameters and optimiser state into the DeepSpeed engine. Every rank must call it."""
    if source.checkpoint is None:
        return
    loaded, _ = engine.load_checkpoint(str(source.checkpoint), tag=source.tag)
    if loaded is None:
        raise PairtileError(
            f"DeepSpeed found nothing to load in {source.checkpoint / source.tag}; remove {source.checkpoint} to go "
            "on from the checkpoint before it"
        )


def full_state_dict(module: nn.Module, runtime: Runtime) -> dict[str, Tensor]:
    """The whole float32 state on rank 0 (empty elsewhere), gathered parameter by parameter under ZeRO-3."""
    import deepspeed

    state: dict[str, Tensor] = {}
    # tied parameters have several names, and a model that loads the file asks for all of them
    for name, parameter in module.named_parameters(remove_duplicate=False):
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
    """Fill a new folder and put it in the place of ``target``, which is never seen half written."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    _sync_tree(partial)
    remove_folder(target)
    os.replace(partial, target)
    _sync(target.parent)


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
