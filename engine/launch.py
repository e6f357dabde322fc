"""Start the trainer on several processes of this machine through the deepspeed launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from .runtime import free_port


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``deepspeed --module pairtile.engine.train`` with ``ranks`` processes; returns its exit code."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        # the launcher asks the accelerator for its devices, and a CPU has as many as it is told
        environment.setdefault("DS_ACCELERATOR", "cpu")
        # every process would start a thread per core otherwise, before the trainer can say how many it wants
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    port = environment.get("MASTER_PORT") or str(free_port())  # the launcher's default is one port for all runs
    command = [
        *(
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--quiet",
            "--master_port",
            port,
            "--num_gpus",
            str(ranks),
        ),
        *("--module", "pairtile.engine.train", *arguments),
    ]
    process = subprocess.Popen(command, env=environment)

    def pass_on(signum: int, frame: Any) -> None:
        # To the ranks alone: they save and exit with 0, and so does the launcher after them. It would itself report
        # a failure, and on one machine it leaves its ranks running when it is signalled.
        for child in psutil.Process(process.pid).children(recursive=True):
            if any(part.startswith("--local_rank") for part in child.cmdline()):
                child.send_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
