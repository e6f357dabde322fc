"""Four ranks of a loop with a collective, one of which fails in the way asked for. watch_worker.py FOLDER WAY...

A way that ends with .json is a recipe to train, in whose third backward one rank is killed. Everything is imported once: every
rank of every way is a fork, made before any thread. Writes FOLDER/WAY-RANK with what the rank said on stderr, and
prints {way: [exit codes]} as json.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pairtile.engine.errors import PairtileError, RankFailure
from pairtile.engine.passes import Passes
from pairtile.engine.recipe import parse_recipe
from pairtile.engine.runtime import free_port
from pairtile.engine.train import train
from pairtile.engine.watch import EXIT_OTHER_RANK, Watch

RANKS, CULPRIT, STEP = 4, 2, 3
TIMEOUT = {"hangs": 4.0}  # seconds; that of the process group is far above


def fail(way: str) -> None:
    if way == "first_killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "hangs":
        time.sleep(600)
    if way == "loader_ends":
        raise PairtileError("the loader ended")


def loop(rank: int, way: str) -> None:
    store = dist.FileStore(f"{sys.argv[1]}/{way}-store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
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


def train_until_killed(rank: int, recipe: str, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_PORT=str(port))
    backward, left = Passes.backward, iter(range(2, -1, -1))

    def backward_or_die(passes: Passes, loss: torch.Tensor) -> None:
        if rank == CULPRIT and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(passes, loss)

    Passes.backward = backward_or_die
    train(parse_recipe(json.loads(Path(recipe).read_text())))


def run_rank(rank: int, way: str, port: int) -> int:
    os.dup2(os.open(f"{sys.argv[1]}/{Path(way).stem}-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    try:
        if way.endswith(".json"):
            train_until_killed(rank, way, port)
        else:
            loop(rank, way)
    except PairtileError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_OTHER_RANK if isinstance(error, RankFailure) else 2
    return 0


def main(ways: list[str]) -> None:
    started = {}
    for way in ways:
        port = free_port()
        for rank in range(RANKS):
            child = os.fork()
            if child == 0:
                os._exit(run_rank(rank, way, port))
            started[child] = Path(way).stem, rank
    codes = {Path(way).stem: [0] * RANKS for way in ways}
    for _ in range(len(started)):
        child, status = os.wait()
        way, rank = started[child]
        codes[way][rank] = os.waitstatus_to_exitcode(status)
    print(json.dumps(codes))


main(sys.argv[2:])
