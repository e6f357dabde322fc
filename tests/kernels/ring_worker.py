"""The ranks of test_ring.py: `python ring_worker.py WORLD CHECK...`; a check is a function of this file.

Every check runs on all ranks, which raise what they find wrong.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from pairtile.kernels import build, use_backend
from pairtile.kernels.build import operators_obstacle
from pairtile.kernels.distributed import Exchange
from ranks import fork_ranks
from sharded_cases import assert_equal_to_one_process, sharded_case, share

FLOAT32_BACKEND = "torch" if operators_obstacle() else "cpp"
#: Seeds that the suite takes; `python -m benchmarks.ranks` takes more.
SEEDS = range(16)


def requests(rank: int, world: int) -> None:
    """Random requests by every strategy."""
    for seed in SEEDS:
        random_request(seed, rank, world)


def random_request(seed: int, rank: int, world: int) -> None:
    """One random request, by gather, ring, and a ring round nodes."""
    sharded = sharded_case(seed, world)
    backend, dtype = (("torch", torch.float64), (FLOAT32_BACKEND, torch.float32))[seed % 2]
    exchanges = [("gather", None), ("ring", None)] + ([("ring", 2)] if world % 2 == 0 and world > 2 else [])
    for strategy, node_size in exchanges:
        with use_backend(backend):
            mine = share(sharded, rank, dtype, Exchange(dist.group.WORLD, strategy, node_size=node_size))
        shares = [None] * world if rank == 0 else None
        dist.gather_object(mine, shares)
        if shares is not None:
            label = f"seed {seed}, {strategy}, node_size {node_size}, rows {sharded.rows}, cols {sharded.cols}"
            assert_equal_to_one_process(sharded, shares, dtype, label)


def main() -> None:
    build()
    world, *names = sys.argv[1:]
    failed = [name for name in names if not fork_ranks(int(world), globals()[name])]
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
