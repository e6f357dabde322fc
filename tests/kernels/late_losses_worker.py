"""One rank of test_late_losses.py: `python late_losses_worker.py RANK WORLD FOLDER`, the losses on this rank's rows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from late_loss_cases import LOSSES, batch
from pairtile.kernels import use_backend


def run(name: str, sizes: list[int], rank: int, options: dict) -> dict:
    """Value, gradients and dropped pairs of a rank's share. Rank r's sets are padded to lengths of its own."""
    start = sum(sizes[:rank])
    b = batch(sum(sizes), empty=sum(sizes) > 3).rows(slice(start, start + sizes[rank]))
    if rank:
        b.y, b.y_mask = b.y[:, :2], b.y_mask[:, :2]
    leaves = [*b.leaves(), torch.tensor([4.0], dtype=torch.float64, requires_grad=True)]
    loss = LOSSES[name].make(rank=rank, world_size=len(sizes), **options)
    with use_backend("torch"):
        value = LOSSES[name].call(loss, b, leaves[-1])
    value.sum().backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return {"value": value.detach(), "gradients": gradients, "dropped": loss.dropped_pairs}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    cases = torch.load(folder / "cases.pt", weights_only=True)
    torch.save([run(name, sizes, rank, options) for name, sizes, options in cases], folder / f"rank{rank}.pt")
    dist.barrier()
    # gloo threads that served collectives inside a backward can abort a normal interpreter exit.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
