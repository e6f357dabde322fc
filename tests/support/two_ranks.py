"""Running a worker script on two gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

_TESTS = Path(__file__).parents[1]


def on_two_ranks(worker: Path, cases: list[tuple], folder: Path) -> list[list[dict]]:
    """Results of each rank for each case; all cases share one start of the processes.

    The worker is called with its rank, 2, and the folder; it reads cases.pt and writes rank{rank}.pt there.
    """
    torch.save(cases, folder / "cases.pt")
    paths = [str(_TESTS / name) for name in ("support", "reference")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    # Errors go to a file: a full pipe would stop the worker.
    with open(folder / "stderr", "w+") as stderr:
        workers = [
            subprocess.Popen([sys.executable, worker, str(rank), "2", folder], env=environment, stderr=stderr)
            for rank in range(2)
        ]
        try:
            codes = [each.wait(timeout=60) for each in workers]
        finally:
            for each in workers:
                each.kill()
        stderr.seek(0)
        assert codes == [0, 0], stderr.read()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
