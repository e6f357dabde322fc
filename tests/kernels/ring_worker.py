"""The ranks of test_ring.py: `python ring_worker.py WORLD CHECK...`; a check is a function of this file.

Every check runs on all ranks, which raise what they find wrong.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from contenders import relative_error
from torch.utils.checkpoint import checkpoint

from pairtile.kernels import (
    ArgMax,
    ArgTopK,
    ClipLoss,
    Diagonal,
    LogSumExp,
    PairScore,
    SameId,
    SDMLoss,
    SigLipLoss,
    SoftmaxMean,
    Teacher,
    TopK,
    build,
    similarity_reduce,
    use_backend,
)
from pairtile.kernels.build import operators_obstacle
from pairtile.kernels.distributed import STRATEGIES, Exchange, count_traffic, predicted_traffic
from rank_losses import (
    LOSSES,
    WIDTH,
    assert_losses_equal_one_process,
    gradients,
    shares_of,
    whole_batch,
)
from ranks import fork_ranks
from sharded_cases import assert_equal_to_one_process, sharded_case, share

#: Seeds that the suite takes; `python -m benchmarks.ranks` takes more.
SEEDS = range(10)


@cache
def served() -> tuple[tuple[str, torch.dtype], ...]:
    """The backends and what each is tested in."""
    return ("torch", torch.float64), ("torch" if operators_obstacle() else "cpp", torch.float32)


def requests(rank: int, world: int) -> None:
    """Random requests by every strategy."""
    for seed in SEEDS:
        random_request(seed, rank, world)


def random_request(seed: int, rank: int, world: int) -> None:
    """One random request, by gather, ring, and a ring round nodes."""
    sharded = sharded_case(seed, world)
    backend, dtype = served()[seed % 2]
    for strategy, node_size in strategies(world):
        with use_backend(backend):
            mine = share(sharded, rank, dtype, Exchange(dist.group.WORLD, strategy, node_size=node_size))
        shares = [None] * world if rank == 0 else None
        dist.gather_object(mine, shares)
        if shares is not None:
            label = f"seed {seed}, {strategy}, node_size {node_size}, rows {sharded.rows}, cols {sharded.cols}"
            assert_equal_to_one_process(sharded, shares, dtype, label)


def losses(rank: int, world: int) -> None:
    """One loss of each way in which terms are put together, on towers under DDP."""
    assert_losses_equal_one_process(["clip_negatives", "multi_positive", "distill"], rank, world, served())


def ties(rank: int, world: int) -> None:
    """Among equal scores the lowest index of the whole batch comes first, whichever rank holds it."""
    generator = torch.Generator().manual_seed(2)
    sizes = [3, 0, 5, 2][:world]
    x, y = torch.randint(-1, 2, (2, sum(sizes), 4), generator=generator).double()
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    asked = {"rows": [ArgTopK(4), TopK(4), ArgMax(Diagonal())], "cols": [ArgTopK(4), TopK(7)]}
    with use_backend("reference"):
        truth = similarity_reduce(x, y, scale=1.0, **asked)
    for strategy in STRATEGIES:
        for backend, dtype in served():
            with use_backend(backend):
                found = similarity_reduce(
                    x[mine].to(dtype), y[mine].to(dtype), scale=1.0, group=dist.group.WORLD, strategy=strategy, **asked
                )
            for given, whole in zip(found[0] + found[1], truth[0] + truth[1], strict=True):
                assert torch.equal(given.double(), whole[mine].double()), (strategy, backend)


def calm_blocks(rank: int, world: int) -> None:
    """Scores near 0 from one rank and of thousands from another: each block sums its exponentials from a shift of its own."""
    generator = torch.Generator().manual_seed(4)
    n = 6
    x, y = torch.randn(2, n * world, 8, generator=generator).double()
    size = torch.tensor([1e-3, 1e3]).double().repeat_interleave(n).repeat(world)[: n * world]
    calm = torch.arange(n * world) // n % 2 == 0
    # A row that may see no calm column has scores of -1e4 alone.
    x[0], y[~calm, 0], ids = 0, -10, torch.zeros(n * world, dtype=torch.int64)
    x[0, 0], ids[0] = 1, 1
    mine = slice(n * rank, n * (rank + 1))

    def outcome(rows: slice, dtype: torch.dtype, **over: object) -> list[torch.Tensor]:
        features = [each[rows].to(dtype).requires_grad_() for each in (x, y * size[:, None])]
        exclude = SameId(ids[rows], calm.long()[rows])
        asked = [LogSumExp(exclude), SoftmaxMean(sharpness=-0.5, exclude=exclude)]
        found = similarity_reduce(*features, scale=1.0, rows=asked, cols=asked, **over)
        results = [each for direction in found for each in direction]
        torch.stack([each.masked_fill(each.isinf(), 0).sum() for each in results]).sum().backward()
        return [each.detach() for each in results] + [each.grad for each in features]

    with use_backend("reference"):
        truth = outcome(slice(None), torch.float64)
    for strategy in STRATEGIES:
        for backend, dtype in served():
            with use_backend(backend):
                found = outcome(mine, dtype, group=dist.group.WORLD, strategy=strategy)
            for k, (given, whole) in enumerate(zip(found, truth, strict=True)):
                error = relative_error(given, whole[mine], 0.0)
                assert error < (1e-10 if dtype == torch.float64 else 1e-5), (strategy, backend, k, error)


def traffic(rank: int, world: int) -> None:
    """Counted bytes are the formula's, exactly."""
    sizes = [4, 0, 5, 1, 2, 7, 1, 3][:world]
    kinds = (
        (torch.float32, None, (True, True)),
        (torch.float32, torch.bfloat16, (True, False)),
        (torch.float64, None, (False, True)),
    )
    for strategy, node_size in strategies(world):
        for dtype, wire_dtype, wanted in kinds:
            how = {"strategy": strategy, "node_size": node_size, "wire_dtype": wire_dtype}
            for name, make in (("clip", ClipLoss), ("siglip", SigLipLoss)):
                loss = make(group=dist.group.WORLD, **how)
                for first_call in (True, False):
                    counted = sent_by(loss, sizes[rank], dtype, wanted)
                    predicted = predicted_traffic(
                        name, sizes, rank, WIDTH, dtype=dtype, gradients=wanted, first_call=first_call, **how
                    )
                    label = name, sizes, how, dtype, wanted, first_call
                    assert counted == predicted, f"{label}: {counted}, predicted {predicted}"


def sent_by(loss: torch.nn.Module, count: int, dtype: torch.dtype, wanted: tuple[bool, bool]) -> Counter[str]:
    """What a step of this rank's pairs sends."""
    features = [torch.randn(count, WIDTH, dtype=dtype).requires_grad_(want) for want in wanted]
    with use_backend("torch"), count_traffic() as account:
        loss(*features, torch.tensor(3.0, dtype=dtype, requires_grad=True), None).backward()
    return +account.sent


def strategies(world: int) -> list[tuple[str, int | None]]:
    """(strategy, node_size)."""
    return [("gather", None), ("ring", None)] + ([("ring", 2)] if world % 2 == 0 and world > 2 else [])


def scopes(rank: int, world: int) -> None:
    """A loss of each node, or of a group, is that of one process per group, and the mean weighs groups by their ranks."""
    shares, halves = shares_of(world)[1], [[0, 1], [2, 3]]
    batch, uneven = whole_batch(shares), [[0, 1, 2], [3]]
    own_group = [dist.new_group(ranks) for ranks in uneven][rank > 2]
    for name in ("clip", "siglip_plus"):
        for groups, scope in ((halves, {"scope": "node", "node_size": 2}), (uneven, {"scope": own_group})):
            by_group = shares.of_groups(groups)
            with use_backend("reference"):
                truth = [gradients(LOSSES[name], by_group.part(batch, k), torch.float64, {}) for k in range(2)]
            for strategy in STRATEGIES:
                options = {"rank": rank, "world_size": world, "strategy": strategy} | scope
                with use_backend("torch"):
                    found = gradients(LOSSES[name], shares.part(batch, rank), torch.float64, options)
                value = truth[rank not in groups[0]]["value"]
                torch.testing.assert_close(found.pop("value"), value, rtol=1e-10, atol=0)
                for key, given in found.items():
                    mean = sum(len(ranks) * each[key] for ranks, each in zip(groups, truth, strict=True)) / world
                    torch.testing.assert_close(given, mean, rtol=1e-10, atol=1e-11)


def misuse(rank: int, world: int) -> None:
    """Ranks that ask for different things all raise, and say what each asks for: none waits for the others."""
    ids, other = torch.arange(4), [torch.arange(4), torch.ones(4)]
    teacher = Teacher(torch.ones(4, 2 + rank), torch.ones(4, 2 + rank))
    requests = {
        "PairScore(": [LogSumExp(), PairScore()],
        "Diagonal(offset=1)": [LogSumExp(Diagonal(0)), LogSumExp(Diagonal(1))],
        "weights=tensor 0 float32": [LogSumExp(), LogSumExp(weights=other[1])],
        "SameId(rows=tensor 0 int64[], cols=tensor 1 int64[])": [
            LogSumExp(SameId(ids, ids)),
            LogSumExp(SameId(ids, other[0])),
        ],
        "TopK(k=3)": [TopK(2), TopK(3)],
        "tensor 1 float32[3]": [LogSumExp(of=teacher)] * 2,
    }
    options = {
        "label_smoothing=0.1": {"label_smoothing": 0.1},
        "reduction='none'": {"reduction": "none"},
        "strategy='gather'": {"strategy": "gather"},
        "wire_dtype=torch.bfloat16": {"wire_dtype": torch.bfloat16},
    }
    for strategy in STRATEGIES:
        group = {"group": dist.group.WORLD, "strategy": strategy}
        for said, asked in requests.items():
            with raised("ranks differ", said):
                similarity_reduce(*drawn(4, 5), scale=1.0, rows=[asked[rank]], **group)
        with raised("ranks differ", "width 6 float32"):
            similarity_reduce(*drawn(4, 5 + rank), scale=1.0, rows=[LogSumExp()], **group)
        for make, given in ((ClipLoss, {"negative_text_features": drawn(4, 5)[0]}), (SDMLoss, {"image_ids": ids})):
            # In a ring each rank may pass negatives of its own.
            if make is SDMLoss or strategy == "gather":
                with raised("ranks differ", "rank 1: "):
                    make(**group)(*drawn(4, 5), 1.0, **given if rank else {})
        with raised("gradients are disabled on ranks [1]", ""), torch.set_grad_enabled(rank == 0):
            ClipLoss(**group)(*drawn(4, 5), 1.0)
    for said, changed in options.items():
        with raised("ranks differ", said):
            ClipLoss(**{"group": dist.group.WORLD, "strategy": "ring"} | (changed if rank else {}))(*drawn(4, 5), 1.0)
    with raised("ranks differ", "rank 1: SigLipLoss"):
        make = SigLipLoss if rank else ClipLoss
        make(group=dist.group.WORLD)(*drawn(4, 5), 1.0, None)


def drawn(rows: int, width: int) -> list[torch.Tensor]:
    return [torch.randn(rows, width).requires_grad_() for _ in range(2)]


@contextmanager
def raised(*texts: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    try:
        yield
    except kind as error:
        said = str(error)
    else:
        said = "no error"
    assert all(text in said for text in texts), (texts, said)


def once_only(rank: int, world: int) -> None:
    """Two calls before a backward, two backwards of a graph, a checkpoint, autocast; a second derivative is refused."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.nn.functional.normalize(torch.randn(2, 3 * world, 4, generator=generator).double(), dim=-1)
    mine = slice(3 * rank, 3 * rank + 3)
    for make in (ClipLoss, SigLipLoss):
        with use_backend("reference"):
            whole = [x.clone().requires_grad_(), y.clone().requires_grad_()]
            make()(*whole, 4.0, None).backward()
        for strategy in STRATEGIES:
            loss = make(group=dist.group.WORLD, strategy=strategy)
            own = [each[mine].clone().requires_grad_() for each in (x, y)]
            with torch.autocast("cpu", torch.bfloat16):
                total = loss(*own, 4.0, None) + checkpoint(loss, *own, 4.0, None, use_reentrant=False)
            total.backward(retain_graph=True)
            total.backward()
            for given, truth in zip(own, whole, strict=True):
                torch.testing.assert_close(given.grad / (4 * world), truth.grad[mine], rtol=1e-10, atol=1e-12)
            for backend in ("torch", "reference"):
                with use_backend(backend):
                    (gradient,) = torch.autograd.grad(loss(*own, 4.0, None), own[1], create_graph=True)
                with raised("differentiate", kind=RuntimeError):
                    gradient.sum().backward()


def main() -> None:
    build()
    world, *names = sys.argv[1:]
    failed = [name for name in names if not fork_ranks(int(world), globals()[name])]
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
