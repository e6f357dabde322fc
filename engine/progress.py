"""What a run tells: a progress bar, ``metrics.jsonl`` and TensorBoard, all from rank 0."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

METRICS = "metrics.jsonl"


class RunLog:
    """Writes the curves of a run. On other ranks than 0 every method does nothing.

    ``metrics.jsonl`` has one object per logged step (``kind: train``) and per evaluation (``kind: eval``). On
    resume the lines after the resumed step are dropped, so that the file is the curve of one uninterrupted run.
    """

    def __init__(self, folder: Path, *, total_steps: int, start_step: int, enabled: bool) -> None:
        self.enabled = enabled
        self._mark = (time.perf_counter(), 0)
        self._samples = 0
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.console = Console(stderr=False, highlight=False)
        rewind(folder / METRICS, "step", start_step)
        self._metrics = (folder / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self.console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, line="")
            self._bar.start()
        self._total = total_steps

    def advance(self, step: int, samples: int) -> None:
        """Count a finished step; ``samples`` pairs over all ranks went into it."""
        self._samples += samples
        if self.enabled and self._bar is not None:
            self._bar.update(self._task, completed=step)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Log the values of a step, with the throughput since the last call and the memory in use."""
        now = time.perf_counter()
        seconds, samples = now - self._mark[0], self._samples - self._mark[1]
        self._mark = (now, self._samples)
        values = {**values, "samples_per_second": samples / max(seconds, 1e-9), "memory_gib": memory_gib()}
        if not self.enabled:
            return
        self._write({"kind": "train", "step": step, **values}, "train", step, values)
        line = (
            f"loss {values['loss']:.4f}  acc {values['accuracy']:.3f}  scale {values['scale']:.2f}  lr {values['lr']:.2e}  "
            f"{values['samples_per_second']:.0f} samples/s  {values['memory_gib']:.1f} GiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, line=line)
        else:
            self.console.print(f"step {step}/{self._total}  {line}", soft_wrap=True)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of an evaluation."""
        if self.enabled:
            self._write({"kind": "eval", "step": step, **values}, "eval", step, values)

    def say(self, message: str) -> None:
        """One line to the person who watches."""
        if self.enabled:
            self.console.print(message, soft_wrap=True, markup=False)

    def pause(self) -> None:
        """Leave out what passes until the next step from the throughput (evaluation, checkpoints)."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        self._mark = (self._mark[0] + time.perf_counter() - self._paused, self._mark[1])

    def close(self) -> None:
        if self.enabled:
            if self._bar is not None:
                self._bar.stop()
            self._metrics.close()
            self._board.close()

    def _write(self, line: dict[str, Any], prefix: str, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        self._metrics.write(json.dumps(finite) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{prefix}/{name}", value, step)


def rewind(path: Path, key: str, last: int) -> None:
    """Drop the lines of a JSONL file whose ``key`` is above ``last``, and one that was cut off by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)[key] <= last:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def memory_gib() -> float:
    """Peak memory of this process: device memory under CUDA, resident memory elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
