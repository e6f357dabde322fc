"""The loss over several processes: contenders for the suite, and two tables of their own.

    python -m benchmarks.over_ranks memory     peak of a rank, at worlds of 2, 4 and 8
    python -m benchmarks.over_ranks overlap    a ring whose hops are delayed, with and without overlap

A pool of processes (gloo) holds the ranks. Features lie in shared memory: a call tells every rank to run its shard forward
and backward, and returns when the slowest is done. Gradients are those after DDP's mean.
"""

from __future__ import annotations

import argparse
import atexit
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from pairtile import kernels
from pairtile.kernels.contrastive.operator import DEFAULT_MEMORY_BUDGET
from pairtile.kernels.distributed import ring as ring_module

from .contrastive import clip_inputs, siglip_inputs
from .harness import Contender
from .peak import _give_back_free_memory, _status
from .peers import missing_backend, missing_peer

#: A loss of this rank's features: (rank, world) -> (images, texts, scale, bias...) -> value.
Loss = Callable[..., Tensor]


def ours(strategy: str, loss: str, rank: int, world: int) -> Loss:
    made: Loss = getattr(kernels, loss)(rank=rank, world_size=world, strategy=strategy)
    return made


def of_open_clip(loss: str, rank: int, world: int) -> Loss:
    import open_clip

    if loss == "SigLipLoss":
        return open_clip.loss.SigLipLoss(rank=rank, world_size=world)  # type: ignore[no-any-return]
    return open_clip.loss.ClipLoss(  # type: ignore[no-any-return]
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world
    )


MAKERS: dict[str, Callable[[str, int, int], Loss]] = {
    "ring": partial(ours, "ring"),
    "gather": partial(ours, "gather"),
    "open_clip": of_open_clip,
}


class Ranks:
    """Processes that wait for orders."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp()
        self.world = world
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, folder, theirs), daemon=True)
            process.start()
            self._ends.append(ours)
            self._processes.append(process)
        atexit.register(self.stop)

    def order(self, *what: Any) -> list[Any]:
        """What every rank answers."""
        for end in self._ends:
            end.send(what)
        answers = [end.recv() for end in self._ends]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def stop(self) -> None:
        for process in self._processes:
            process.kill()


@cache
def pool(world: int) -> Ranks:
    return Ranks(world)


def prepared(maker: str, loss: str, world: int, leaves: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A call over a pool: [value, dx, dy, dscale, (dbias)], the gradients after the mean over ranks."""
    ranks = pool(world)
    shared = [each.detach().clone().share_memory_() for each in leaves]
    gradients = [torch.empty_like(each).share_memory_() for each in shared[:2]]
    key = ranks.order("load", maker, loss, shared, gradients)[0]

    def call() -> list[Tensor]:
        value, *scalars = (torch.tensor(statistics.fmean(each)) for each in zip(*ranks.order("run", key), strict=True))
        return [value, *(each.clone() for each in gradients), *scalars]

    return call


class _Rank:
    """One process' side."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.loaded: list[tuple[Loss, list[Tensor], list[Tensor]]] = []

    def load(self, maker: str, loss: str, shared: list[Tensor], gradients: list[Tensor]) -> int:
        mine = [each.chunk(self.world)[self.rank] if each.dim() else each for each in shared]
        of_mine = [each.chunk(self.world)[self.rank] for each in gradients]
        self.loaded.append((MAKERS[maker](loss, self.rank, self.world), mine, of_mine))
        return len(self.loaded) - 1

    def run(self, key: int) -> list[float]:
        loss, mine, gradients = self.loaded[key]
        leaves = [each.clone().requires_grad_() for each in mine]
        value = loss(*leaves)
        value.backward()
        for target, leaf in zip(gradients, leaves, strict=False):
            assert leaf.grad is not None
            target.copy_(leaf.grad / self.world)
        return [float(value.detach()), *(float(each.grad) for each in leaves[2:] if each.grad is not None)]

    def peak(self, maker: str, loss: str, small: list[Tensor], large: list[Tensor]) -> int:
        """Bytes that a call adds to its leaves, after a small one."""
        made = MAKERS[maker](loss, self.rank, self.world)
        leaves: list[Tensor] = []
        before = 0
        for inputs in (small, large):
            leaves = [(each.chunk(self.world)[self.rank] if each.dim() else each).clone() for each in inputs]
            leaves = [each.requires_grad_() for each in leaves]
            _give_back_free_memory()
            dist.barrier()
            with open("/proc/self/clear_refs", "w") as control:
                control.write("5")
            before = _status("VmRSS")
            made(*leaves).backward()
        return _status("VmHWM") - before

    def delayed(self, key: int, seconds: float, overlap: bool) -> list[float]:
        with _delayed_hops(seconds, overlap):
            return self.run(key)


def _serve(rank: int, world: int, folder: str, end: Connection) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    mine = _Rank(rank, world)
    while True:
        name, *given = end.recv()
        try:
            end.send(getattr(mine, name)(*given))
        except Exception as error:
            end.send(error)


class _delayed_hops:
    """Lets every hop of a ring take so many seconds more; without overlap the rank waits for it at once."""

    def __init__(self, seconds: float, overlap: bool) -> None:
        self._seconds, self._overlap = seconds, overlap

    def __enter__(self) -> None:
        seconds, overlap = self._seconds, self._overlap
        self._kept = ring_module.Transfer

        class Delayed(ring_module.Transfer):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                self._due = time.perf_counter() + seconds
                if not overlap:
                    self.received()

            def received(self) -> list[Tensor]:
                time.sleep(max(0.0, self._due - time.perf_counter()))
                return super().received()

        ring_module.Transfer = Delayed  # type: ignore[misc]

    def __exit__(self, *raised: object) -> None:
        ring_module.Transfer = self._kept  # type: ignore[misc]


def contenders(loss: str, world: int) -> list[Contender]:
    backend = missing_backend("cpp")
    return [
        Contender("ring", partial(prepared, "ring", loss, world), missing=backend, ours=True),
        Contender("gather", partial(prepared, "gather", loss, world), missing=backend, ours=True),
        Contender("open_clip", partial(prepared, "open_clip", loss, world), missing=missing_peer("open_clip")),
    ]


def memory_table(local: int, width: int, worlds: list[int]) -> None:
    """Peak of the leanest and the fattest rank, in MB."""
    print(f"ClipLoss float32, {local} rows a rank, D = {width}: peak of a rank beyond its features, in MB")
    print(f"{'world':>5} {'':>10} {'peak':>8} {'beyond the tile budget':>23}")
    for world in worlds:
        for maker in MAKERS:
            if maker == "open_clip" and (world > 4 or missing_peer("open_clip")):
                continue  # two matrices of [local, world * local] and their gradients, for each rank
            ranks = Ranks(world)
            small, large = (clip_inputs(rows * world, width) for rows in (64, local))
            share = [[each.detach() for each in inputs] for inputs in (small, large)]
            for inputs in share:
                for each in inputs:
                    each.share_memory_()
            peak = max(ranks.order("peak", maker, "ClipLoss", *share))
            ranks.stop()
            beyond = f"{(peak - DEFAULT_MEMORY_BUDGET) / 1e6:.0f}" if maker != "open_clip" else ""
            print(f"{world:>5} {maker:>10} {peak / 1e6:>8.0f} {beyond:>23}", flush=True)


def overlap_table(batch: int, width: int, world: int, rounds: int) -> None:
    """Medians of interleaved rounds, in ms."""
    ranks = Ranks(world)
    shared = [each.detach().share_memory_() for each in clip_inputs(batch, width)]
    gradients = [torch.empty_like(each).share_memory_() for each in shared[:2]]
    key = ranks.order("load", "ring", "ClipLoss", shared, gradients)[0]
    delays = (0.0, 0.05, 0.1, 0.2)
    seconds: dict[tuple[float, bool], list[float]] = {(d, on): [] for d in delays for on in (True, False)}
    for _ in range(rounds + 1):
        for setting, found in seconds.items():
            start = time.perf_counter()
            ranks.order("delayed", key, *setting)
            found.append(time.perf_counter() - start)
    print(f"ClipLoss float32 in a ring of {world}, batch {batch}, D = {width}: ms of a step, median of {rounds}")
    print(f"{'delay of a hop':>15} {'overlapped':>11} {'waited for':>11}")
    for delay in delays:
        on, off = (statistics.median(seconds[delay, overlap][1:]) * 1e3 for overlap in (True, False))
        print(f"{delay * 1e3:>12.0f} ms {on:>11.0f} {off:>11.0f}")
    ranks.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "overlap"))
    parser.add_argument("--rows", type=int, default=4096, help="of a rank (memory), or of all ranks / 2 (overlap)")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.what == "memory":
        memory_table(given.rows, given.width, given.worlds)
    else:
        overlap_table(2 * given.rows, given.width, 2, given.rounds)


INPUTS = {"ClipLoss": clip_inputs, "SigLipLoss": siglip_inputs}

if __name__ == "__main__":
    main()
