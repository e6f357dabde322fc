"""Several ranks for the price of one start: a process imports what they need, then forks them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

_TESTS = Path(__file__).parents[1]


def start(worker: Path, *arguments: object, timeout: float = 120) -> None:
    """Run a worker script, which forks the ranks, and fail with what they printed."""
    paths = [str(_TESTS / name) for name in ("support", "reference")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(worker), *map(str, arguments)]
    # A session of its own, so that a timeout ends the ranks too.
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
    assert process.returncode == 0, printed[-8000:]


def fork_ranks(world: int, work: Callable[[int, int], None], *, timeout: float = 60) -> bool:
    """Call work(rank, world) in `world` processes, joined by gloo; whether all returned.

    The caller must have run nothing on threads: a fork copies the calling thread alone. When one rank fails the others,
    which would wait for it, are ended.

    Args:
        world: number of ranks.
        work: what each does.
        timeout: seconds that a rank waits for another.
    """
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        children = [_forked(rank, world, work, Path(folder) / "store", timeout) for rank in range(world)]
        return _all_returned(children)


def _forked(rank: int, world: int, work: Callable[[int, int], None], store: Path, timeout: float) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        # As launchers do; DeepSpeed asks for it.
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        work(rank, world)
        dist.barrier()
        code = 0
    except BaseException:
        print(f"rank {rank} of {world}:\n{traceback.format_exc()}")
    finally:
        sys.stdout.flush()
        # gloo threads that served collectives inside a backward can abort a normal interpreter exit.
        os._exit(code)


def _all_returned(children: list[int]) -> bool:
    failed = False
    while children:
        for child in list(children):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                children.remove(child)
                failed = failed or status != 0
        if failed:
            # Time for the others to say what they saw.
            time.sleep(1)
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, 9)
        time.sleep(0.01)
    return not failed
