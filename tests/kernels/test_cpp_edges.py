"""The edges of the C++ tiles: sizes at their borders, memory that nobody wrote, scores at the limit of exp, threads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from contenders import threads
from torch import Tensor

from pairtile.kernels import (
    ArgTopK,
    Diagonal,
    DifferentId,
    LogSumExp,
    Paced,
    PairScore,
    SameId,
    SoftmaxMean,
    SoftplusSum,
    Target,
    Teacher,
    TopK,
    similarity_reduce,
    use_backend,
)
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


def taught(x: Tensor, y: Tensor, budget: int | None) -> Tensor:
    """Two teachers of other widths, expectations under every kind of softmax, and exponents with and without a shift."""
    n, m, half = len(x), len(y), (x.shape[1] + 1) // 2
    ids = SameId(torch.arange(n) % 7, torch.arange(m) % 5)
    # Of the features, so that float64 has the same: in another order, and half of them.
    near = Teacher(x.detach().flip(1), y.detach().roll(1, 1), torch.linspace(1, 9, n))
    sharp = Teacher(x.detach()[:, :half], y.detach()[:, :half], 90.0)
    weights = torch.arange(m) % 3.0
    rows, cols = similarity_reduce(
        x,
        y,
        scale=8.0,
        col_bias=torch.linspace(-1, 1, m),
        rows=[
            SoftmaxMean(under=near, exclude=ids, weights=weights),
            SoftmaxMean(under=sharp),
            SoftmaxMean(sharp, sharpness=20.0),
            SoftmaxMean(sharpness=-2.0, exclude=Diagonal(1)),
            LogSumExp(of=Paced(30.0, 1.0, 0.25, 0.25)),
        ],
        cols=[
            SoftmaxMean(under=sharp, exclude=ids),
            SoftmaxMean(near, weights=torch.arange(n) % 3.0),
            SoftmaxMean(near, sharp),
            SoftmaxMean(sharpness=20.0),
            LogSumExp(of=near),
            LogSumExp(ids, of=Paced(-0.1, -1.0, 1.25, 0.75)),
        ],
        memory_budget=budget,
    )
    results = [each.masked_fill(each.isinf(), 0) for each in (*rows, *cols)]
    return sum((each * torch.linspace(-1, 2, len(each))).mean() for each in results)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (33, 270, 17), (513, 255, 65), (40, 70, 4097)])
def test_teachers_at_the_borders_of_tiles(n, m, d, dtype):
    leaves = features(n, m, d, dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with use_backend("reference"):
        truth = value_and_gradients(lambda x, y: taught(x, y, None), *wide)
    for budget in (1, 1 * MIB, 64 * MIB):
        found = value_and_gradients(lambda x, y, budget=budget: taught(x, y, budget), *leaves)
        for given, expected in zip(found, truth, strict=True):
            error = (given.double() - expected).norm() / max(float(expected.norm()), 1e-3)
            # A teacher's exponent of 90 is rounded to 4e-6, and its softmax with it.
            assert error < 3 * TOLERANCES[dtype], budget


# torch fills fresh memory with NaN in this mode: a buffer read before it is written shows in the results.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [1, 1 * MIB, 64 * MIB])
def test_no_memory_is_read_before_it_is_written(dtype, budget):
    leaves = features(270, 300, 33, dtype)
    requests = (mixed, plain, taught)
    expected = [value_and_gradients(lambda x, y, f=f: f(x, y, budget), *leaves) for f in requests]
    torch.use_deterministic_algorithms(True)
    try:
        found = [value_and_gradients(lambda x, y, f=f: f(x, y, budget), *leaves) for f in requests]
    finally:
        torch.use_deterministic_algorithms(False)
    for given, before in zip(chain(*found), chain(*expected), strict=True):
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
    outcomes = []
    for count in (1, 2, 5, 20):
        with threads(count):
            outcomes.append(
                value_and_gradients(lambda x, y: cross_entropy_sum(x, y, scale=9.0, memory_budget=budget), *leaves)
            )
    for other in outcomes[1:]:
        assert all(torch.equal(one, two) for one, two in zip(outcomes[0], other, strict=True))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with use_backend("reference"):
        truth = value_and_gradients(lambda x, y: cross_entropy_sum(x, y, scale=9.0), *wide)
    for given, expected in zip(outcomes[0], truth, strict=True):
        assert (given.double() - expected).norm() / expected.norm() < 2e-6  # the bar of test_exactness.py


@pytest.mark.parametrize("request_of", [mixed, taught])
@pytest.mark.parametrize("budget", [1 * MIB, 64 * MIB])
def test_the_number_of_threads_leaves_no_trace_in_the_bits(request_of, budget):
    leaves, outcomes = features(600, 900, 40), []
    for count in (1, 2, 5):
        with threads(count):
            outcomes.append(value_and_gradients(lambda x, y: request_of(x, y, budget), *leaves))
    for other in outcomes[1:]:
        assert all(torch.equal(one, two) for one, two in zip(outcomes[0], other, strict=True))


# Small whole numbers are exact in any order of the sums, so nearly every score has equals in every tile.
@pytest.mark.parametrize(("k", "exclude"), [(1, None), (9, SameId), (300, DifferentId)])
def test_among_equals_the_lowest_index_comes_first_in_any_tile_and_thread(k, exclude):
    n, m = 600, 700
    generator = torch.Generator().manual_seed(k)
    x, y = (torch.randint(-2, 3, (size, 3), generator=generator).float() for size in (n, m))
    teacher = Teacher(x.flip(1), y, 0.5)
    rules = exclude and exclude(torch.arange(n) % 5, torch.arange(m) % 5)
    asked = [each(k, rules, of) for of in (None, teacher) for each in (TopK, ArgTopK)]

    def chosen(dtype: torch.dtype) -> list[Tensor]:
        rows, cols = similarity_reduce(x.to(dtype), y.to(dtype), scale=2.0, rows=asked, cols=asked)
        return [*rows, *cols]

    with use_backend("reference"):
        truth = chosen(torch.float32)
    for count in (1, 2, 5):
        with threads(count):
            for dtype in (torch.float32, torch.bfloat16):
                for given, expected in zip(chosen(dtype), truth, strict=True):
                    assert torch.equal(given, expected)


def test_a_nan_survives_every_reduction_and_stays_in_its_row():
    x, y = (each.detach().clone() for each in features(40, 50, 8))
    x[3, 0] = torch.nan
    teacher = Teacher(x, y, 100.0)
    paced = Paced(1.0, 1.0, 0.25, 0.25)
    asked = [
        LogSumExp(),
        LogSumExp(of=teacher),
        LogSumExp(of=paced),
        SoftmaxMean(),
        SoftmaxMean(teacher),
        SoftmaxMean(under=teacher),
        SoftplusSum(None),
        TopK(1),
    ]
    rows, cols = similarity_reduce(x, y, scale=100.0, rows=asked, cols=asked)
    for each in rows:
        assert torch.equal(each.reshape(40).isnan(), torch.arange(40) == 3)
    assert all(each.isnan().all() for each in cols)
    _, (scores, where) = similarity_reduce(x, y, scale=100.0, cols=[TopK(2), ArgTopK(2)])
    assert bool((where[:, 0] == 3).all())
    assert bool(scores[:, 1].isfinite().all())


# One pair holds all of the softmax: its derivative p (A - mean) is 0, however large A is.
def test_the_gradient_of_a_peaked_softmax_does_not_cancel():
    n = 70
    x = torch.eye(n).requires_grad_()
    teacher = Teacher(torch.eye(n) * 0.3, torch.eye(n), 333.3)
    asked = [SoftmaxMean(teacher), SoftmaxMean(teacher, weights=torch.linspace(0.1, 1, n))]
    rows, cols = similarity_reduce(x, torch.eye(n), scale=1e4, rows=asked, cols=asked)
    (gradient,) = torch.autograd.grad(sum(each.sum() for each in (*rows, *cols)), x)
    assert not gradient.any()


# Two rows share a column, and a column reads its pair from the other side: no tile is made for their gradients.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_pair_scores_alone(dtype):
    n, m = 33, 21
    scale, row_bias, col_bias = torch.linspace(1, 2, n), torch.randn(n), torch.randn(m)
    leaves = [*features(n, m, 7, dtype), *(each.requires_grad_() for each in (scale, row_bias, col_bias))]
    targets = Target(torch.arange(n) * 5 % m - (torch.arange(n) % 4 == 0).long() * m)

    def loss(x: Tensor, y: Tensor, scale: Tensor, row_bias: Tensor, col_bias: Tensor) -> Tensor:
        (first, second), (third,) = similarity_reduce(
            x,
            y,
            scale=scale,
            row_bias=row_bias,
            col_bias=col_bias,
            rows=[PairScore(targets), PairScore(Diagonal(2))],
            cols=[PairScore(Diagonal(-1))],
        )
        results = [each.masked_fill(each.isinf(), 0) for each in (first, second, third)]
        return sum((each * torch.linspace(-1, 2, len(each))).sum() for each in results)

    with use_backend("reference"):
        truth = value_and_gradients(loss, *[leaf.detach().double().requires_grad_() for leaf in leaves])
    for given, expected in zip(value_and_gradients(loss, *leaves), truth, strict=True):
        assert (given.double() - expected).norm() / expected.norm() < TOLERANCES[dtype]


# In tiles ids are compared in 32 bits.
def test_ids_beyond_32_bits_stay_apart():
    x, y = features(40, 50, 8)
    rows, cols = torch.arange(40) % 6, torch.arange(50) % 6
    far = 2**32 * (rows % 3), 2**32 * (cols % 3)
    small = similarity_reduce(x, y, scale=5.0, rows=[LogSumExp(SameId(rows, cols))])[0][0]
    assert torch.equal(
        small, similarity_reduce(x, y, scale=5.0, rows=[LogSumExp(SameId(rows + far[0], cols + far[1]))])[0][0]
    )
    merged = similarity_reduce(x, y, scale=5.0, rows=[LogSumExp(SameId(*far))])[0][0]
    assert not torch.equal(small, merged)


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
        torch.ops.pairtile.similarity_reduce(
            x, x, torch.tensor(1.0), None, None, None, [1, 7, -1, 0, 0, -1, -1, -1], [], [], MIB
        )


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
