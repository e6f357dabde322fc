import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from curves import environment
from pairtile.engine.errors import PairtileError
from pairtile.engine.model import DualOutput
from pairtile.engine.runtime import (
    Runtime,
    clear_stale_build_locks,
    environment_rank,
    fix_build_folders,
    seed_step,
    store_of_attempt,
)
from pairtile.engine.statistics import in_batch_accuracy
from pairtile.kernels.build import build_directory

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


@pytest.mark.parametrize("extensions", [None, "theirs"])
def test_what_was_built_before_is_found_by_the_trainer(monkeypatch, tmp_path, extensions):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PAIRTILE_CACHE", "")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "theirs"))
    if extensions is None:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    before = build_directory()
    assert fix_build_folders() == tmp_path / (extensions or "pairtile/extensions")
    assert build_directory() == before


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


def test_ranks_that_torchrun_starts_again_do_not_find_what_dead_ones_wrote(monkeypatch):
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    first, again = (store_of_attempt(attempt, 0, 2, timedelta(seconds=20)) for attempt in ("1", "2"))
    first.set("address", "of a dead rank")
    assert first.check(["address"])
    assert not again.check(["address"])


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
