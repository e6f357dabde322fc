"""similarity_reduce and the losses over gloo processes, each start for several checks of ring_worker.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ranks

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("ring_worker.py")
CHECKS = {
    2: ["requests", "misuse", "once_only", "ties", "calm_blocks"],
    3: ["requests", "losses"],
    4: ["scopes", "traffic"],
}


@pytest.mark.parametrize("world", CHECKS)
def test_ranks(world):
    ranks.start(WORKER, world, *CHECKS[world])


def test_zero_1_2_and_3_have_the_gradient_of_one_process():
    command = [sys.executable, "-m", "benchmarks.ranks", "zero"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert finished.stdout.count("worst") == 12, finished.stdout  # losses, stages, strategies
