"""Exactness over ranks, at length: what the test suite checks on few ranks and few cases, and tables beside it.

    python -m benchmarks.ranks requests     random requests of similarity_reduce, worlds 1, 2, 3, 4, 8
    python -m benchmarks.ranks losses       every loss over embeddings under DistributedDataParallel, the same worlds
    python -m benchmarks.ranks zero         ClipLoss and SigLipLoss under DeepSpeed ZeRO 1, 2, 3
    python -m benchmarks.ranks traffic      bytes counted and predicted, worlds 2, 4, 8
    python -m benchmarks.ranks open_clip    which of open_clip's exchanges have the gradient of one process

Truth is the dense formula in float64 on one process, for `losses` and below through the parameters of two towers. All
but the last fail where an error exceeds 1e-10 (float64, torch) or max(1e-5, twice that of dense float32) (float32, cpp).
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TESTS = Path(__file__).parents[1] / "tests"
# The cases are the test suite's.
sys.path[:0] = [str(_TESTS / folder) for folder in ("kernels", "support", "reference")]

from contenders import relative_error  # noqa: E402

import rank_losses  # noqa: E402
import ring_worker  # noqa: E402
from pairtile.kernels import build, use_backend  # noqa: E402
from ranks import fork_ranks  # noqa: E402

WORLDS = (1, 2, 3, 4, 8)
#: Random requests of each world.
SEEDS = 200


def requests(rank: int, world: int) -> None:
    for seed in range(SEEDS):
        ring_worker.random_request(seed, rank, world)
    if rank == 0:
        print(f"{world} ranks: {SEEDS} random requests, each by {ring_worker.strategies(world)}: as on one process")


def losses(rank: int, world: int) -> None:
    """A table of the worst error of each loss, of its value and of all parameters."""
    for name in rank_losses.LOSSES:
        found = {
            backend: rank_losses.assert_losses_equal_one_process([name], rank, world, [(backend, dtype)])
            for backend, dtype in (("torch", torch.float64), ("cpp", torch.float32))
        }
        if rank == 0:
            print(f"{world} ranks: {name:24}", *(f"{backend} {error:.1e}" for backend, error in found.items()))


def traffic(rank: int, world: int) -> None:
    ring_worker.traffic(rank, world)
    if rank == 0:
        print(f"{world} ranks: every byte of ClipLoss and SigLipLoss as predicted")


def zero(rank: int, world: int) -> None:
    """ClipLoss and SigLipLoss; `zero_all` takes every loss."""
    _zero(rank, world, ["clip", "siglip"])


def zero_all(rank: int, world: int) -> None:
    _zero(rank, world, list(rank_losses.LOSSES))


def _zero(rank: int, world: int, names: list[str]) -> None:
    """The gradient is what one step of SGD with learning rate 1 takes off the parameters."""
    for name in names:
        shares = rank_losses.shares_of(world)[1]
        truth, dense = (
            rank_losses.on_one_process(rank_losses.LOSSES[name], shares, dtype)
            for dtype in (torch.float64, torch.float32)
        )
        for stage in (1, 2, 3):
            if stage == 3 and name.startswith("coca"):
                continue  # its loss reads a weight of the towers from outside of them, where ZeRO 3 has it in parts
            for strategy in ("gather", "ring"):
                given = _under_zero(name, shares, rank, world, stage, strategy)
                errors = rank_losses.errors_of(given, truth, dense, torch.float32)
                worst = max(errors, key=lambda key: errors[key][0] / errors[key][1])
                if rank == 0:
                    print(f"{name:7} ZeRO {stage} {strategy:7} worst {errors[worst][0]:.1e} of {worst}")
                for key, (error, allowed) in errors.items():
                    assert error <= allowed, (name, stage, strategy, key, error, allowed)


def _under_zero(
    name: str, shares: rank_losses.Shares, rank: int, world: int, stage: int, strategy: str
) -> dict[str, Tensor]:
    import deepspeed

    loss = rank_losses.LOSSES[name]
    towers = rank_losses.Towers(loss.without)
    trained = {key: each for key, each in towers.named_parameters() if each.requires_grad}
    before = {key: each.detach().clone() for key, each in trained.items()}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        # By default ZeRO 3 leaves parameters as small as these whole.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=towers, optimizer=optimizer, config=config)
    batch = shares.part(rank_losses.whole_batch(shares), rank).to(torch.float32)
    value = loss.call(loss.make(rank=rank, world_size=world, strategy=strategy), engine(batch), batch)
    engine.backward(value)
    engine.step()
    with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=stage == 3):
        step = {key: before[key] - each.detach() for key, each in trained.items()}
    engine.destroy()
    return {"value": value.detach()} | step


def open_clip(rank: int, world: int) -> None:
    """open_clip's losses and ours beside one process, float64, equal shards, which open_clip takes for granted."""
    import open_clip.loss as theirs

    shares = rank_losses.shares_of(world)[0]
    clip, siglip = (rank_losses.LOSSES[name] for name in ("clip", "siglip"))
    rows: list[tuple[str, rank_losses.RankLoss, rank_losses.RankLoss, dict[str, Any]]] = []
    for local in (False, True):
        for with_grad in (False, True):
            options = {"local_loss": local, "gather_with_grad": with_grad}
            label = f"ClipLoss local_loss={local!s:5} gather_with_grad={with_grad!s:5}"
            rows.append((f"open_clip {label}", clip, clip._replace(make=theirs.ClipLoss), options))
    for exchange in ("bidir", "shift", "reduce", "gather"):
        label = f"open_clip SigLipLoss dist_impl={exchange}"
        rows.append((label, siglip, siglip._replace(make=theirs.SigLipLoss), {"dist_impl": exchange}))
    for name, ours in (("ClipLoss", clip), ("SigLipLoss", siglip)):
        rows += [(f"pairtile {name} {strategy}", ours, ours, {"strategy": strategy}) for strategy in ("gather", "ring")]
    for label, truth_of, loss, options in rows:
        truth = rank_losses.on_one_process(truth_of, shares, torch.float64)
        batch = shares.part(rank_losses.whole_batch(shares), rank)
        with use_backend("torch"):
            given = rank_losses.gradients(loss, batch, torch.float64, {"rank": rank, "world_size": world} | options)
        _compare(label, given, truth, rank, world)


def _compare(label: str, given: dict[str, Tensor | None], truth: dict[str, Tensor], rank: int, world: int) -> None:
    values: list[Any] = [None] * world
    dist.all_gather_object(values, float(given["value"]))
    if rank:
        return
    towers = [key for key in truth if "." in key]
    taken = torch.cat(
        [torch.zeros_like(truth[key]).flatten() if given[key] is None else given[key].flatten() for key in towers]
    )  # type: ignore[union-attr]
    whole = torch.cat([truth[key].flatten() for key in towers])
    ratio = float(taken @ whole / (whole @ whole))
    scale = given["log_scale"]
    of_scale = float("nan") if scale is None else float(scale / truth["log_scale"])
    off = max(abs(value / float(truth["value"]) - 1) for value in values)
    print(
        f"{world} ranks  {label:62} value of a rank off by {off:.0e}, gradient of the towers: error "
        f"{relative_error(taken, whole, 0.0):.1e}, {ratio:.4f} times as long; of the scale: {of_scale:.4f} times"
    )


TABLES: dict[str, tuple[Callable[[int, int], None], tuple[int, ...]]] = {
    "requests": (requests, WORLDS),
    "losses": (losses, WORLDS),
    "zero": (zero, (2,)),
    "zero_all": (zero_all, (2,)),
    "traffic": (traffic, (2, 4, 8)),
    "open_clip": (open_clip, (2, 4)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="+", choices=TABLES)
    parser.add_argument("--worlds", type=int, nargs="*", help="numbers of ranks instead of the table's own")
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore")
    build()
    failed = [
        (table, world)
        for table in arguments.table
        for world in arguments.worlds or TABLES[table][1]
        if not fork_ranks(world, TABLES[table][0], timeout=300)
    ]
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
