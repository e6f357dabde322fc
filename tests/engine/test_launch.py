"""The ways people start and stop a run: deepspeed, torchrun, python; SIGTERM; kill -9."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from curves import PYTHON, environment, losses, run
from pairtile.engine.checkpoint import list_checkpoints
from pairtile.engine.launch import launch


@pytest.mark.slow
def test_launchers_give_the_same_losses(tiny, write_recipe, tmp_path, monkeypatch):
    path = write_recipe(**{"train.zero_stage": 2})
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "pairtile.engine.train",
    ]
    for name, command in (("python", PYTHON), ("torchrun", torchrun)):
        done = run([*command, str(path), f"output={tmp_path / name}"])
        assert done.returncode == 0, done.stdout + done.stderr
    # tests that trained in this process have set them for it
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch(2, [str(path), f"output={tmp_path / 'deepspeed'}"]) == 0
    # the same kernels on the same shards: two ranks agree bit for bit however they were started
    assert losses(tmp_path / "deepspeed") == losses(tmp_path / "torchrun")
    # one rank adds the gradients in another order
    assert losses(tmp_path / "python") == pytest.approx(losses(tmp_path / "torchrun"), rel=1e-5)


def test_wrong_recipe_under_python_has_no_traceback(write_recipe):
    done = run([*PYTHON, str(write_recipe()), "train.batchsize=3"])
    assert done.returncode == 2
    assert done.stderr == f"error: {write_recipe()}: unknown key train.batchsize; did you mean train.batch_size?\n"


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def logged_steps(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.is_file() else 0


def test_sigterm_saves_and_exits_0(write_recipe, tmp_path):
    path, folder = write_recipe(**{"train.steps": 100_000}), tmp_path / "run"
    process = subprocess.Popen(
        [*PYTHON, str(path)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(lambda: logged_steps(folder) >= 3, process)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, printed
    assert "asked to stop: saved step" in printed
    saved = list_checkpoints(folder / "checkpoints")
    assert len(saved) == 1
    assert saved[0].name == f"step-{max(losses(folder)):08d}"


@pytest.mark.slow
def test_sigterm_to_the_command_reaches_the_ranks_and_their_loader_workers(write_recipe, tmp_path):
    path, folder = write_recipe(**{"train.steps": 100_000, "data.workers": 1}), tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "pairtile.engine", "train", str(path), "--ranks", "2"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: logged_steps(folder) >= 2, process)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed
    assert "asked to stop: saved step" in printed
    assert len(list_checkpoints(folder / "checkpoints")) == 1


@pytest.mark.slow
def test_killed_five_times_and_resumed_the_curve_is_the_same_bit_for_bit(write_recipe, tmp_path):
    steps = 60
    changes = {
        "train.steps": steps,
        "train.save_every": 1,
        "train.zero_stage": 2,
        "train.warmup_steps": 5,
        "eval.splits": [],
    }
    path = write_recipe(**changes)
    whole = run([*PYTHON, str(path), f"output={tmp_path / 'whole'}"])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    seed = random.randrange(10**6)
    print(f"random seed {seed}")
    chance = random.Random(seed)
    folder = tmp_path / "killed"
    command = [*PYTHON, str(path), f"output={folder}"]
    for kill in range(5):
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # each time some steps further; a checkpoint is written at every step, so kills fall into and between them
        target = min(steps - 5, chance.randint(3, 8) + 9 * kill)
        wait_for(lambda target=target: max(losses_so_far(folder), default=0) >= target, process)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed at step" in done.stdout
    assert losses(folder) == losses(tmp_path / "whole")
    assert sorted(losses(folder)) == list(range(1, steps + 1))


def losses_so_far(folder):
    file = folder / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line)["step"])
        except ValueError:
            continue
    return found
