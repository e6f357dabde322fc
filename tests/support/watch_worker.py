"""Four ranks of a loop with a collective, one of which fails in the way asked for. watch_worker.py FOLDER WAY...

torch is imported once: every rank of every way is a fork, made before any thread. Writes FOLDER/WAY-RANK with what the rank
said, and prints {way: [exit codes]} as json.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from pairtile.engine.errors import PairtileError
from pairtile.engine.watch import EXIT_OTHER_RANK, Watch

RANKS, CULPRIT, STEP = 4, 2, 3
TIMEOUT = {"hangs": 4.0}  # seconds; that of the process group is far above


def fail(way: str) -> None:
    if way in ("killed", "first_killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "hangs":
        time.sleep(600)
    if way == "loader_ends":
        raise PairtileError("the loader ended")


def loop(rank: int, way: str) -> None:
    with Watch() as watch:
        watch.begin(rank, RANKS, timeout=TIMEOUT.get(way, 60.0))
        for step in range(1, 6):
            watch.at(step, "data")
            if step == STEP and rank == (0 if way == "first_killed" else CULPRIT):
                fail(way)
            watch.at(step, "loss")
            dist.all_reduce(torch.ones(4))
            # without it gloo's sends leave a rank some steps ahead of one that failed
            dist.barrier()


def run_rank(rank: int, way: str, folder: str) -> int:
    said = os.open(os.path.join(folder, f"{way}-{rank}"), os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 2)
    store = dist.FileStore(os.path.join(folder, f"{way}-store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    try:
        loop(rank, way)
    except PairtileError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return EXIT_OTHER_RANK if type(error) is not PairtileError else 2
    return 0


def main(folder: str, ways: list[str]) -> None:
    started = {}
    for way in ways:
        for rank in range(RANKS):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                os._exit(run_rank(rank, way, folder))
            started[child] = way, rank
    codes: dict[str, list[int]] = {way: [0] * RANKS for way in ways}
    for _ in range(len(started)):
        child, status = os.wait()
        way, rank = started[child]
        codes[way][rank] = os.waitstatus_to_exitcode(status)
    print(json.dumps(codes))


main(sys.argv[1], sys.argv[2:])
