import signal
import subprocess
import sys

import pytest
import torch

from curves import environment
from pairtile.engine.errors import PairtileError
from pairtile.engine.model import DualOutput
from pairtile.engine.runtime import Runtime, clear_stale_build_locks, environment_rank, seed_step
from pairtile.engine.statistics import in_batch_accuracy

ALIVE = """
import sys, time
from pathlib import Path
from pairtile.engine.runtime import clear_stale_build_locks
folder = Path(sys.argv[1])
clear_stale_build_locks(folder)
(folder / "op" / "lock").touch()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_build_lock_of_a_killed_trainer_does_not_hang_the_next_start(tmp_path):
    """The lock file is what torch.utils.cpp_extension leaves; test_build.py compiles for real behind such a one."""
    (tmp_path / "op").mkdir()
    killed = subprocess.Popen([sys.executable, "-c", ALIVE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "ready\n"
    # while that process lives its lock is respected
    started = subprocess.run([sys.executable, "-c", ALIVE.replace("time.sleep(60)", "").replace('(folder / "op" / "lock").touch()', ""),
                              str(tmp_path)], capture_output=True)  # fmt: skip
    assert started.returncode == 0
    assert (tmp_path / "op" / "lock").exists()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    command = [sys.executable, "-c", "import sys, pathlib; from pairtile.engine.runtime import clear_stale_build_locks;"
               "clear_stale_build_locks(pathlib.Path(sys.argv[1]))", str(tmp_path)]  # fmt: skip
    subprocess.run(command, env=environment(), check=True, timeout=60)
    assert not (tmp_path / "op" / "lock").exists()


def test_locks_are_kept_while_a_sibling_is_alive(tmp_path):
    clear_stale_build_locks(tmp_path)  # this process now counts as alive
    (tmp_path / "lock").touch()
    clear_stale_build_locks(tmp_path)
    assert (tmp_path / "lock").exists()


def test_rank_from_the_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment_rank() == (0, 0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert environment_rank() == (3, 0, 4)
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(PairtileError, match="WORLD_SIZE is 'four'"):
        environment_rank()


def test_seed_depends_on_rank_and_batch_alone():
    draws = []
    for arguments in ((1, 0, 5), (1, 0, 5), (1, 1, 5), (1, 0, 6), (2, 0, 5)):
        seed_step(*arguments)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


def test_in_batch_accuracy():
    image = torch.eye(4)
    text = image[[0, 1, 3, 2]]
    output = DualOutput(image, text, torch.ones(1), None)
    runtime = Runtime(0, 0, 1, torch.device("cpu"), None)
    assert in_batch_accuracy(output, runtime) == (0.5, 0.5)
