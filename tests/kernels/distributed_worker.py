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

from pairtile import kernels
from pairtile.kernels import ClipLoss, CoCaLoss, SigLipLoss, use_backend

LOSSES = {"clip": ClipLoss, "siglip": SigLipLoss, "coca": CoCaLoss}
LENGTH, VOCABULARY = 3, 11


def two_towers(case: dict) -> nn.ModuleDict:
    """Linear towers, a decoder's head, a scale and a bias, the same on every rank."""
    torch.manual_seed(3)
    dtype = case["dtype"]
    towers = nn.ModuleDict({"image": nn.Linear(6, 5).to(dtype), "text": nn.Linear(4, 5).to(dtype)})
    towers["decoder"] = nn.Linear(6, LENGTH * 5).to(dtype)
    towers["vocabulary"] = nn.Linear(5, VOCABULARY, bias=False).to(dtype)
    towers.register_parameter("scale", nn.Parameter(torch.tensor(case["scale"], dtype=dtype)))
    towers.register_parameter("bias", nn.Parameter(torch.tensor([-1.5], dtype=dtype)))
    return towers


def embed(towers: nn.ModuleDict, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        nn.functional.normalize(towers[kind](each), dim=-1) for kind, each in (("image", images), ("text", texts))
    )


def called(loss: nn.Module, towers: nn.ModuleDict, case: dict, rank: int) -> torch.Tensor:
    """The value of the case's loss for this rank's part of the batch."""
    sizes = {"images": case["sizes"], "texts": case.get("text_sizes", case["sizes"])}
    images, texts = (case[kind].split(sizes[kind])[rank] for kind in sizes)
    features = embed(towers, images, texts)
    if case.get("detach_empty") and len(images) == 0:
        features = tuple(each.detach() for each in features)
    if case["loss"] == "coca":
        labels = case["labels"].split(case["sizes"])[rank]
        hidden = towers["decoder"](images).view(-1, LENGTH, 5)
        if case["from_hidden"]:
            head = {"hidden_states": hidden, "vocab_weight": towers["vocabulary"].weight}
            return sum(loss(*features, None, labels, towers.scale, **head))
        return sum(loss(*features, towers["vocabulary"](hidden), labels, towers.scale))
    if "numbers" in case:
        # A loss by its public name: how many of scale and bias it takes, and what else its forward is given.
        given = {
            name: each.split(sizes[kind])[rank] for kind in sizes for name, each in case.get(f"of_{kind}", {}).items()
        }
        return loss(*features, *(towers.scale, towers.bias)[: case["numbers"]], **given)
    negatives = {}
    for kind, sizes in case.get("negatives", {}).items():
        inputs = case[f"negative_{kind}s"].split(sizes)[rank]
        pair = embed(towers, inputs, texts[:0]) if kind == "image" else embed(towers, images[:0], inputs)
        negatives[f"negative_{kind}_features"] = pair[kind == "text"]
    return loss(*features, towers.scale, towers.bias, **negatives)


def run(case: dict, rank: int, world: int) -> dict:
    towers = two_towers(case)
    place = {"group": dist.group.WORLD} if case.get("by_group") else {"rank": rank, "world_size": world}
    weights = (2.0, 1.0) if case["loss"] == "coca" else ()
    make = LOSSES[case["loss"]] if case["loss"] in LOSSES else getattr(kernels, case["loss"])
    loss = make(*weights, **place, **case["options"])
    with use_backend(case["backend"]):
        value = called(loss, towers, case, rank)
    value.sum().backward()
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in towers.named_parameters()}
    return {"value": value.detach(), "gradients": gradients}


def said_by(case: dict, rank: int, world: int) -> dict:
    """The message of the error that every rank is expected to raise."""
    width = 5 + (rank if case["differ"] == "width" else 0)
    dtype = torch.float64 if case["differ"] == "dtype" and rank else torch.float32
    try:
        own = (rank + 1) % world if case["differ"] == "rank" else rank
        negatives = {"negative_text_features": torch.zeros(2, width)} if case["differ"] == "negatives" and rank else {}
        ClipLoss(rank=own, world_size=world)(*torch.zeros(2, 3, width, dtype=dtype), 1.0, **negatives)
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
