"""Start the trainer on several processes of this machine through the deepspeed launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``deepspeed --module pairtile.engine.train`` with ``ranks`` processes; returns its exit code."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        # the launcher asks the accelerator for its devices, and a CPU has as many as it is told
        environment.setdefault("DS_ACCELERATOR", "cpu")
        # every process would start a thread per core otherwise, before the trainer can say how many it wants
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(ranks)),
        *("--module", "pairtile.engine.train", *arguments),
    ]
    return subprocess.run(command, env=environment).returncode
