"""One of two ranks under DistributedDataParallel: gradients of a batch in chunks, and how often they were reduced.

Called by two_ranks.on_two_ranks; a case is the rows of each rank.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pairtile.engine import GradientCache
from pairtile.kernels import ClipLoss
from two_towers import TwoTowers, pairs


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = []
    for shards in torch.load(folder / "cases.pt"):
        torch.manual_seed(0)
        model = DistributedDataParallel(TwoTowers(dropout=0.0).double(), find_unused_parameters=False)
        reduced = []

        def count(state, bucket, reduced=reduced):
            reduced.append(bucket.index())
            return allreduce_hook(state, bucket)

        model.register_comm_hook(None, count)
        mine = [tensor.split(list(shards))[rank] for tensor in pairs(torch.float64, sum(shards))]
        cache = GradientCache(model, chunk=3, shared=("logit_scale", "vocab_weight"))
        output = cache(*mine)
        features = output["image_features"], output["text_features"]
        loss = ClipLoss(group=dist.group.WORLD)(*features, output["logit_scale"])
        cache.backward(loss + 0.1 * output["vocab_weight"].square().sum())
        gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
        results.append({"gradients": gradients, "reduced": len(reduced), "buckets": len(set(reduced))})
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo threads may outlive the group


main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
