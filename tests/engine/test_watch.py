"""What a run of several ranks does when one dies, hangs or has nothing more to read: all end and name it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from curves import PYTHON, environment, losses, run
from pairtile.engine.errors import PairtileError
from pairtile.engine.runtime import Runtime
from pairtile.engine.train import next_batch

WORKER = Path(__file__).parents[1] / "support" / "watch_worker.py"
CODES = {
    "killed": [3, 3, -signal.SIGKILL, 3],
    "first_killed": [-signal.SIGKILL, 3, 3, 3],  # the store goes with it
    "hangs": [3, 3, 3, 3],
    "loader_ends": [3, 3, 2, 3],
    "fine": [0, 0, 0, 0],
}
SAID = {
    "killed": "rank 2 died: no sign of life for",
    "first_killed": "rank 0 died: nobody answers there",
    "hangs": "rank 2 hangs in step 3 (data, watch_worker.py:",
    "loader_ends": "rank 2 stopped in step 3 (data, watch_worker.py:",
}


def test_the_rank_that_fails_is_named_by_all_others(tmp_path):
    done = subprocess.run(
        [sys.executable, WORKER, tmp_path, *CODES], env=environment(), capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == CODES
    for way, said in SAID.items():
        for rank, code in enumerate(CODES[way]):
            if code == 3:
                assert said in (tmp_path / f"{way}-{rank}").read_text(), (way, rank)
    assert not any((tmp_path / f"fine-{rank}").read_text() for rank in range(4))


def test_a_loader_that_ends_is_an_error_that_says_where():
    runtime = Runtime(2, 2, 4, "cpu", None)
    with pytest.raises(
        PairtileError, match=r"the loader of rank 2 ended before batch 7; every rank needs the same number"
    ):
        next_batch(iter([]), SimpleNamespace(batch_index=7), runtime)


def rank_processes(launcher):
    found = psutil.Process(launcher).children(recursive=True)
    ranks = [each for each in found if "pairtile.engine.train" in each.cmdline() and "RANK" in each.environ()]
    return {int(each.environ()["RANK"]): each for each in ranks if "LOCAL_RANK" in each.environ()}


@pytest.mark.slow
def test_killed_in_mid_step_under_the_launcher_the_run_ends_and_goes_on_from_its_checkpoint(write_recipe, tmp_path):
    path = write_recipe(**{"train.steps": 100_000, "train.save_every": 5, "train.zero_stage": 2, "eval.splits": []})
    command = [sys.executable, "-m", "pairtile.engine", "train", str(path), "--ranks", "4"]
    with open(tmp_path / "said", "w+") as said:
        process = subprocess.Popen(
            command, env=environment(), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 200
            while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
                assert process.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() < deadline, "nothing happened"
                time.sleep(0.1)
            rank_processes(process.pid)[2].kill()
            killed = time.monotonic()
            assert process.wait(timeout=60) != 0
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    text = (tmp_path / "said").read_text()
    print(f"ended {time.monotonic() - killed:.0f} s after the kill")
    for rank in (0, 1, 3):
        assert f"error (rank {rank}): rank 2 died" in text or (rank == 0 and "error: rank 2 died" in text), text
    saved = max((tmp_path / "run" / "checkpoints").glob("step-*")).name
    steps = int(saved.removeprefix("step-")) + 2
    done = run([*PYTHON, str(path), f"train.steps={steps}", "train.zero_stage=2"], timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed at step" in done.stdout
    assert max(losses(tmp_path / "run")) == steps
