"""One rank of the tests in test_distributed.py: `python distributed_worker.py RANK WORLD FOLDER`.

Reads FOLDER/cases.pt, joins the others through a file store in FOLDER, and writes FOLDER/rank{RANK}.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from pairtile.kernels import ClipLoss, SigLipLoss, use_backend

LOSSES = {"clip": ClipLoss, "siglip": SigLipLoss}


def two_towers(case: dict) -> nn.ModuleDict:
    """Linear towers, a scale and a bias, the same on every rank."""
    torch.manual_seed(3)
    dtype = case["dtype"]
    towers = nn.ModuleDict({"image": nn.Linear(6, 5).to(dtype), "text": nn.Linear(4, 5).to(dtype)})
    towers.register_parameter("scale", nn.Parameter(torch.tensor(case["scale"], dtype=dtype)))
    towers.register_parameter("bias", nn.Parameter(torch.tensor([-1.5], dtype=dtype)))
    return towers


def embed(towers: nn.ModuleDict, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        nn.functional.normalize(towers[kind](each), dim=-1) for kind, each in (("image", images), ("text", texts))
    )


def run(case: dict, rank: int, world: int) -> dict:
    towers = two_towers(case)
    images, texts = (part.split(case["sizes"])[rank] for part in (case["images"], case["texts"]))
    features = embed(towers, images, texts)
    if case.get("detach_empty") and len(images) == 0:
        features = tuple(each.detach() for each in features)
    place = {"group": dist.group.WORLD} if case.get("by_group") else {"rank": rank, "world_size": world}
    loss = LOSSES[case["loss"]](**place, **case["options"])
    with use_backend(case["backend"]):
        value = loss(*features, towers.scale, towers.bias)
    value.sum().backward()
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in towers.named_parameters()}
    return {"value": value.detach(), "gradients": gradients}


def said_by(case: dict, rank: int, world: int) -> dict:
    """The message of the error that every rank is expected to raise."""
    width = 5 + (rank if case["differ"] == "width" else 0)
    dtype = torch.float64 if case["differ"] == "dtype" and rank else torch.float32
    try:
        own = (rank + 1) % world if case["differ"] == "rank" else rank
        ClipLoss(rank=own, world_size=world)(*torch.zeros(2, 3, width, dtype=dtype), 1.0)
    except ValueError as error:
        return {"message": str(error)}
    return {"message": "no error"}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = []
    for case in torch.load(folder / "cases.pt", weights_only=True):
        results.append(said_by(case, rank, world) if "differ" in case else run(case, rank, world))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    # gloo threads that served collectives inside a backward can abort a normal interpreter exit.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
