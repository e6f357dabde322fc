"""One rank of test_objectives_distributed.py: `python objectives_worker.py RANK WORLD FOLDER`.

Runs every objective on this rank's rows and writes FOLDER/rank{RANK}.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from objectives import OBJECTIVES, beside
from pairtile.kernels import use_backend

WIDTH = 5


def features(sizes: list[int]) -> list[torch.Tensor]:
    """x and y of the whole batch."""
    generator = torch.Generator().manual_seed(sum(sizes))
    drawn = torch.randn(2, sum(sizes), WIDTH, generator=generator, dtype=torch.float64)
    return list(F.normalize(drawn, dim=-1))


def run(name: str, sizes: list[int], rows: slice, backend: str, options: dict) -> dict:
    """Value and gradients of these rows' share."""
    leaves = [each[rows].clone().requires_grad_() for each in features(sizes)]
    leaves.append(torch.tensor([6.0], dtype=torch.float64, requires_grad=True))
    b = beside(sizes, WIDTH)
    if rows == slice(None):
        starts = torch.tensor([sum(sizes[:rank]) for rank in range(len(sizes))])
        b.perm = b.perm + starts.repeat_interleave(torch.tensor(sizes))
    else:
        b = b.rows(rows.start, rows.stop)
    objective = OBJECTIVES[name]
    with use_backend(backend):
        value = objective.call(objective.make(**options), *leaves, b)
    value.sum().backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return {"value": value.detach(), "gradients": gradients}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = []
    for name, sizes, options in torch.load(folder / "cases.pt", weights_only=True):
        start = sum(sizes[:rank])
        place = {"rank": rank, "world_size": world} | options
        results.append(run(name, sizes, slice(start, start + sizes[rank]), "torch", place))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    # gloo threads that served collectives inside a backward can abort a normal interpreter exit.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
