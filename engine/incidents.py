"""What goes wrong in a batch: told on stderr, counted, and listed in the run folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import TrainerState
from .data import Batch
from .errors import PairtileError
from .model import DualOutput
from .recipe import Recipe
from .runtime import Runtime

SKIPPED = "skipped.jsonl"
BAD_BATCHES = "bad_batches.jsonl"


def non_finite(output: DualOutput, loss: Tensor) -> tuple[bool, bool]:
    """(this rank's features are not finite, the loss is not): the first names the culprit among the ranks."""
    features = torch.stack([embeddings.detach().sum() for embeddings in output.embeddings()])
    return not bool(torch.isfinite(features).all()), not bool(torch.isfinite(loss.detach()))


def report_bad_batch(
    what: str, batch: Batch, state: TrainerState, flags: list[list[bool]], run_dir: Path, runtime: Runtime
) -> None:
    """Say which ranks, which step and which samples. The first flag of a rank says that it is the culprit."""
    state.bad_batches += 1
    culprits = [rank for rank, flag in enumerate(flags) if flag[0]] or list(range(runtime.world_size))
    if runtime.rank not in culprits:
        return
    where = {"step": state.step + 1, "batch": batch.batch_index, "rank": runtime.rank}
    append_line(run_dir / BAD_BATCHES, {**where, "what": what, "keys": batch.keys})
    shown = ", ".join(batch.keys[:8]) + (", ..." if len(batch.keys) > 8 else "")
    place = f"rank {runtime.rank}, step {state.step + 1}, batch {batch.batch_index}"
    print(f"{place}: {what} (keys: {shown})", file=sys.stderr, flush=True)


def stop_if_hopeless(bad_in_a_row: int, recipe: Recipe, state: TrainerState) -> None:
    if bad_in_a_row >= recipe.train.max_bad_batches:
        raise PairtileError(
            f"stopped after step {state.step}: loss or gradients were not finite for {bad_in_a_row} batches in a row "
            f"(train.max_bad_batches); they are listed in {recipe.run_dir / BAD_BATCHES}. Lower train.lr or raise "
            "train.warmup_steps; checkpoints are intact"
        )


def count_skipped(batch: Batch, state: TrainerState, run_dir: Path) -> None:
    """Keep count of samples that could not be used, and list them in ``skipped.jsonl``."""
    for key, reason in batch.skipped:
        state.skipped_samples[reason] = state.skipped_samples.get(reason, 0) + 1
        append_line(run_dir / SKIPPED, {"batch": batch.batch_index, "key": key, "reason": reason})


def append_line(path: Path, entry: dict[str, Any]) -> None:
    # one write of one line in append mode, so that lines of several ranks do not mix
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
