"""The edges of the C++ tiles: sizes at their borders, memory that nobody wrote, scores at the limit of exp, threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile.kernels import Diagonal, LogSumExp, PairScore, SameId, SoftplusSum, Target, similarity_reduce, use_backend
from pairtile.kernels.contrastive.sums import cross_entropy_sum, sigmoid_sum

pytestmark = pytest.mark.usefixtures("cpp")

MIB = 2**20
# Weights of a tile, and then the gradients, are rounded to the features' type: half an eps each.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def features(n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + m + d)
    x, y = (F.normalize(torch.randn(size, d, generator=generator), dim=-1).to(dtype) for size in (n, m))
    return x.requires_grad_(), y.requires_grad_()


def value_and_gradients(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def mixed(x: Tensor, y: Tensor, budget: int | None) -> Tensor:
    """Rules, weights and temperatures that take the general path, negative ones and 0 included."""
    n, m = len(x), len(y)
    ids = SameId(torch.arange(n) % 7, torch.arange(m) % 5)
    (rows, soft), (cols,) = similarity_reduce(
        x,
        y,
        scale=torch.linspace(-3, 3, n).round(),
        col_bias=torch.linspace(-1, 1, m),
        rows=[LogSumExp(ids), SoftplusSum(Diagonal(1), ids)],
        cols=[LogSumExp(weights=torch.arange(n) % 3.0)],
        memory_budget=budget,
    )
    results = [each.masked_fill(each.isinf(), 0) for each in (rows, soft, cols)]
    return sum((each * torch.linspace(-1, 2, len(each))).mean() for each in results)


def plain(x: Tensor, y: Tensor, budget: int | None) -> Tensor:
    both = cross_entropy_sum(
        x, y, scale=9.0, pair=Diagonal(1), row_weight=1 / len(x), col_weight=1 / len(y), memory_budget=budget
    )
    targets = Target(torch.arange(len(x)) * 3 % len(y) - (torch.arange(len(x)) % 4 == 0).long() * len(y))
    one = cross_entropy_sum(x, y, scale=9.0, pair=targets, row_weight=1 / len(x), memory_budget=budget)
    return both + one + sigmoid_sum(x, y, scale=9.0, bias=-5.0, weight=1 / len(x), memory_budget=budget)


# Borders of tiles (16, 256), of chunks (an eighth of the rows) and of panels (2048 rows), odd widths, and features wide
# enough to be converted by parts (4097).
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [
        (1, 1, 1),
        (15, 17, 3),
        (16, 256, 64),
        (257, 255, 65),
        (511, 513, 7),
        (2049, 31, 5),
        (33, 2047, 1),
        (40, 70, 4097),
        (300, 1001, 515),  # large enough to go in steps of stored exponentials (one_go.h)
    ],
)
@pytest.mark.parametrize("request_of", [mixed, plain], ids=["mixed", "plain"])
def test_sizes_at_the_borders_of_tiles(n, m, d, dtype, request_of):
    leaves = features(n, m, d, dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with use_backend("reference"):
        truth = value_and_gradients(lambda x, y: request_of(x, y, None), *wide)
    for budget in (1, 1 * MIB, 64 * MIB):
        found = value_and_gradients(lambda x, y, budget=budget: request_of(x, y, budget), *leaves)
        for given, expected in zip(found, truth, strict=True):
            # A gradient that cancels is measured against 1e-3, about what one pair contributes.
            error = (given.double() - expected).norm() / max(float(expected.norm()), 1e-3)
            assert error < TOLERANCES[dtype], budget


# torch fills fresh memory with NaN in this mode: a buffer read before it is written shows in the results.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [1, 1 * MIB, 64 * MIB])
def test_no_memory_is_read_before_it_is_written(dtype, budget):
    leaves = features(270, 300, 33, dtype)
    expected = [value_and_gradients(lambda x, y, f=f: f(x, y, budget), *leaves) for f in (mixed, plain)]
    torch.use_deterministic_algorithms(True)
    try:
        found = [value_and_gradients(lambda x, y, f=f: f(x, y, budget), *leaves) for f in (mixed, plain)]
    finally:
        torch.use_deterministic_algorithms(False)
    for given, before in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.equal(given, before)


# exp(S) without a shift, times gradient / sum: at S near 80 that factor left the range of float32's normal numbers.
@pytest.mark.parametrize("upstream", [1.0, 1e-6])
@pytest.mark.parametrize("scale", [49.0, 60.0, 79.0, 100.0])
def test_a_collapsed_batch_keeps_its_gradients_at_any_scale(scale, upstream):
    n = 600
    generator = torch.Generator().manual_seed(0)
    near = F.normalize(torch.ones(1, 16) + 0.05 * torch.randn(2 * n, 16, generator=generator), dim=-1)
    leaves = [each.clone().requires_grad_() for each in near.split(n)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for weights in ((1.0, 0.0), (0.5, 0.5)):

        def loss(x, y, weights=weights):
            return cross_entropy_sum(x, y, scale=scale, row_weight=weights[0] / n, col_weight=weights[1] / n)

        with use_backend("reference"):
            truth = torch.autograd.grad(loss(*wide), wide, torch.tensor(upstream, dtype=torch.float64))
        for given, expected in zip(torch.autograd.grad(loss(*leaves), leaves, torch.tensor(upstream)), truth):
            # Scores of 79 are rounded to 4e-6, and exp and the gradient with them.
            assert (given.double() - expected).norm() / expected.norm() < 2e-5


# How many cosines are stored depends on the threads; where dy's sums are cut must not.
@pytest.mark.parametrize(
    ("n", "d", "m", "budget"),
    [
        (600, 400, 2000, 1 * MIB),
        (600, 400, 2000, 4 * MIB),
        # Wide: chunks are lowered to be stored two at a time, and features are operands as they lie.
        (2100, 16, 3000, 4 * MIB),
        (2100, 64, 3000, 4 * MIB),  # in steps of stored exponentials, whose rows many threads share out
    ],
)
def test_what_is_stored_for_some_threads_leaves_no_trace_in_the_bits(n, d, m, budget):
    leaves = features(n, m, d)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 20):
            torch.set_num_threads(threads)
            outcomes.append(
                value_and_gradients(lambda x, y: cross_entropy_sum(x, y, scale=9.0, memory_budget=budget), *leaves)
            )
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(one, two) for one, two in zip(outcomes[0], other, strict=True))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with use_backend("reference"):
        truth = value_and_gradients(lambda x, y: cross_entropy_sum(x, y, scale=9.0), *wide)
    for given, expected in zip(outcomes[0], truth, strict=True):
        assert (given.double() - expected).norm() / expected.norm() < 2e-6  # the bar of test_exactness.py


# Called past the checks of Python, the operator would read behind the end of too few targets.
def test_too_few_targets_are_refused_by_the_operator_itself():
    x = torch.ones(5, 3)
    with pytest.raises(RuntimeError, match="targets must be contiguous int64, one for each row of x"):
        torch.ops.pairtile.cross_entropy_sum(
            x, x, torch.tensor(1.0), torch.zeros(3, dtype=torch.long), 0, 1.0, 0.0, MIB
        )


# A kind that nobody defined would be served as if it were a sum of softplus.
def test_a_plan_with_an_unknown_kind_is_refused():
    x = torch.ones(5, 3)
    with pytest.raises(RuntimeError, match="no reduction has the kind 7"):
        torch.ops.pairtile.similarity_reduce(x, x, torch.tensor(1.0), None, None, None, [1, 7, -1, 0, 0], [], MIB)


# All inputs empty at once, with one temperature for each of no rows, and no reduction at all.
def test_nothing_asked_of_nothing():
    x, y = torch.zeros(0, 4, requires_grad=True), torch.zeros(3, 0, requires_grad=True)
    scale = torch.ones(0, requires_grad=True)
    assert similarity_reduce(x, x, scale=2.0) == ((), ())
    (lse,), (pair,) = similarity_reduce(x, x[:0], scale=scale, rows=[LogSumExp()], cols=[PairScore()])
    assert lse.shape == pair.shape == (0,)
    assert all(not each.any() for each in torch.autograd.grad((lse.sum() + pair.sum()), (x, scale)))
    (flat,), _ = similarity_reduce(y, y, scale=1.0, rows=[LogSumExp()])  # D = 0: every score is 0
    assert torch.equal(flat, torch.tensor(3.0).log().expand(3))


# The upstream gradient reaches float16 features unrounded: 65536, GradScaler's first scale, is no float16.
@pytest.mark.parametrize("loss", [sigmoid_sum, cross_entropy_sum])
def test_a_loss_scale_beyond_float16(loss):
    x, y = features(20, 20, 8, torch.float16)
    (expected,) = torch.autograd.grad(loss(x, y, scale=5.0), x)
    (scaled,) = torch.autograd.grad(loss(x, y, scale=5.0) * 2**-16, x, torch.tensor(65536.0))
    assert torch.equal(scaled, expected)
    (scaled,) = torch.autograd.grad(loss(x, y, scale=5.0) / 65536 * 6.5536, x, torch.tensor(65536.0))
    # Rounded once before and once after it is scaled.
    torch.testing.assert_close(scaled.float(), 6.5536 * expected.float(), rtol=2e-3, atol=1e-4)
