"""What could break the Triton kernels in particular: NaN, shifts at their limits, weights of 0, scaled gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from pairtile.kernels import (
    ArgTopK,
    ColumnRange,
    CountAbove,
    Diagonal,
    HingeSum,
    LogSumExp,
    Paced,
    PairScore,
    SigLipLoss,
    SoftmaxMean,
    SoftplusSum,
    Teacher,
    TopK,
    similarity_reduce,
    use_backend,
)

CLIP = (LogSumExp(Diagonal()), PairScore())
EVERY = (LogSumExp(), LogSumExp(Diagonal()), SoftplusSum(Diagonal()), PairScore())
NAMES = ("x", "y", "scale", "bias", "row_bias", "col_bias")


def unit(rows: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def outcome(backend, x, y, rows, cols, upstream=None, dtype=None, **operands):
    """Results, and the gradients of all operands from `upstream` (random) at the results that are not -inf."""
    given = {name: torch.as_tensor(each) for name, each in (("x", x), ("y", y), *operands.items())}
    leaves = {name: each.to(dtype or each.dtype).detach().requires_grad_() for name, each in given.items()}
    generator = torch.Generator().manual_seed(1)
    with use_backend(backend):
        results = similarity_reduce(**leaves, rows=rows, cols=cols)
        results = [*results[0], *results[1]]
        if upstream is None:
            upstream = [torch.randn(len(each), generator=generator) for each in results]
        total = sum((r.masked_fill(r == -torch.inf, 0) * u.to(r.dtype)).sum() for r, u in zip(results, upstream))
        return [*results, *torch.autograd.grad(total, list(leaves.values()))]


def kinds(tensor: Tensor) -> list[Tensor]:
    return [tensor.isnan(), tensor.isposinf(), tensor.isneginf()]


def assert_like_float64(x, y, rows, cols, **more):
    """Results, and gradients of everything but scale and bias: those pass through zero, see test_exactness."""
    found, exact, dense = (
        outcome(backend, x, y, rows, cols, dtype=dtype, **more)
        for backend, dtype in (("triton", None), ("reference", torch.float64), ("reference", torch.float32))
    )
    for k, (given, truth, plain) in enumerate(zip(found, exact, dense, strict=True)):
        finite = truth.isfinite()
        assert torch.equal(given.isfinite(), finite), f"result {k}"
        if not truth.dim():
            continue
        error, of_dense = (float((each - truth)[finite].norm()) for each in (given, plain))
        # The project's bound: a score of size s carries 1e-7 s, and is an exponent in a gradient, dense or not.
        assert error <= max(5e-6 * float(truth[finite].norm()), 1.5 * of_dense), f"result {k}"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "request_",
    [(EVERY, EVERY), (CLIP, CLIP), ((SoftplusSum(Diagonal()),), ())],
    ids=["everything", "CLIP", "SigLIP"],
)
def test_nan_and_infinities_go_where_torch_has_them(value, request_):
    x = unit(70, 8)
    x[3, 2] = value
    given, expected = (outcome(backend, x, unit(90, 8, 1), *request_, scale=3.0) for backend in ("triton", "torch"))
    results = sum(map(len, request_))
    for one, other in zip(given[:results], expected[:results], strict=True):
        assert all(map(torch.equal, kinds(one), kinds(other)))
    for one, other in zip(given[results:], expected[results:], strict=True):
        # Of an infinity and NaN a gradient is whichever comes first.
        assert torch.equal(one.isfinite(), other.isfinite())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("left_out", ["by range", "by weight"])
def test_scores_that_are_left_out_may_be_anything(value, left_out):
    y = unit(90, 8, 1)
    y[40, 1] = value
    without = (torch.arange(90) != 40).float()
    rows = {
        "by range": (LogSumExp(ColumnRange(40, 41)), SoftplusSum(None, ColumnRange(40, 41))),
        "by weight": (LogSumExp(weights=without), SoftplusSum(None, weights=without)),
    }[left_out]
    for backend in ("triton", "torch"):
        assert all(each.isfinite().all() for each in outcome(backend, unit(70, 8), y, rows, (), scale=1.0)[:2])


@pytest.mark.parametrize(
    ("scale", "bias"), [(0.0, 1e4), (-14.3, -1e4), (100.0, 79.0), (-14.3, -79.0), (100.0, -88.0), (1e4, 0.0)]
)
def test_scores_of_any_size(scale, bias):
    assert_like_float64(unit(70, 16), unit(80, 16, 1), EVERY, EVERY, scale=scale, bias=bias)


@pytest.mark.parametrize("gap", [60.0, 1000.0])
def test_rows_and_columns_far_below_their_tile(gap):
    """Below one shift for the whole tile they would underflow."""
    low = torch.zeros(70).index_fill(0, torch.arange(0, 70, 7), -gap)
    assert_like_float64(unit(70, 16), unit(70, 16, 1), EVERY, EVERY, scale=10.0, row_bias=low)
    assert_like_float64(unit(70, 16), unit(70, 16, 1), EVERY, EVERY, scale=10.0, col_bias=low)


@pytest.mark.parametrize("size", [75.0, 76.0, 92.0, -75.5])
def test_where_the_sums_of_exponentials_stop_to_fit(size):
    """Every score at the largest that the norms allow: around the switch between no shift and a maximum."""
    assert_like_float64(torch.full((70, 4), 0.5), torch.full((90, 4), 0.5), CLIP, CLIP, scale=size)


@pytest.mark.parametrize("weights", [[0.0, 1e-30, 1e30], [1e-30] * 3, [1e-40, 0.0, 1e-40]], ids=str)
def test_weights_of_any_size(weights):
    weights = torch.tensor(weights).repeat(30)
    x, y = unit(70, 16), unit(90, 16, 1)
    assert_like_float64(x, y, (LogSumExp(weights=weights), SoftplusSum(weights=weights)), (), scale=10.0)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 700, 3), (1, 1, 1), (70, 80, 0), (300, 1, 2)])
def test_lean_shapes(n, m, d):
    assert_like_float64(torch.ones(n, d) / 2, unit(m, d, 1), EVERY, EVERY, scale=10.0, bias=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-3, 65_536.0])
def test_upstream_gradients_of_any_size(dtype, size):
    """As a GradScaler makes them. The weights of the pairs are rounded to the dtype, and must not leave its range."""
    x = unit(70, 16)
    y = F.normalize(x + unit(70, 16, 1), dim=1)
    # dx, of size scale * upstream, has to fit into float16 itself.
    upstream = [size * each for each in torch.randn(4, 70, generator=torch.Generator().manual_seed(2))]
    requests = (x.to(dtype), y.to(dtype), CLIP, CLIP, upstream)
    found = outcome("triton", *requests, scale=0.1)[4:6]
    for given, truth in zip(found, outcome("reference", *requests, dtype=torch.float64, scale=0.1)[4:6]):
        # Two roundings of half an eps, and what of dx lies below the dtype's normal numbers.
        bound = torch.finfo(dtype).eps * truth.norm() + torch.finfo(dtype).smallest_normal * 1e-3 * truth.numel() ** 0.5
        assert (given.double() - truth).norm() <= bound


def test_the_sigmoid_loss_survives_loss_scaling():
    """dx of one step lies below float16's normal numbers; times GradScaler's 65,536 it is ordinary."""
    x, y = (unit(64, 16, seed).half() for seed in (0, 1))
    found = []
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaves = [each.to(dtype).requires_grad_() for each in (x, y)]
        with use_backend(backend):
            loss = SigLipLoss()(*leaves, torch.tensor(0.01), torch.tensor(-5.0))
        found.append(torch.autograd.grad(loss * 65_536, leaves))
    for given, truth in zip(*found, strict=True):
        assert (given.double() - truth).norm() <= torch.finfo(torch.float16).eps * truth.norm()


@pytest.mark.parametrize("asked", range(4))
def test_an_upstream_gradient_of_one_result_alone(asked):
    upstream = [torch.randn(70) if k == asked else torch.zeros(70) for k in range(4)]
    assert_like_float64(unit(70, 16), unit(70, 16, 1), CLIP, CLIP, scale=14.3, upstream=upstream)


def test_temperatures_of_both_signs_and_many_sizes():
    scale = torch.cat([torch.logspace(-6, 2, 35), -torch.logspace(-6, 2, 35)])
    assert_like_float64(unit(70, 16), unit(90, 16, 1), EVERY, EVERY, scale=scale)


def reduced(backend, x, y, rows, cols, **more) -> list[Tensor]:
    with use_backend(backend):
        results = similarity_reduce(x, y, rows=rows, cols=cols, **more)
    return [*results[0], *results[1]]


@pytest.mark.parametrize("k", [1, 7, 20, 250])  # picked in the tile, left to the host, more than there are
def test_among_equal_scores_the_lowest_index_comes_first(k):
    """Whole numbers of few values, in several tiles and panels; the last columns are duplicates of the first."""
    generator = torch.Generator().manual_seed(k)
    x, y = (torch.randint(-2, 3, (length, 3), generator=generator).float() for length in (150, 200))
    y[180:] = y[:20]
    bias = torch.randint(-1, 2, (200,), generator=generator).float()
    teacher = Teacher(-x, y, 2.0)
    asked = [each(k, exclude, of) for each in (TopK, ArgTopK) for exclude, of in ((Diagonal(), None), (None, teacher))]
    more = {"scale": 3.0, "col_bias": bias, "memory_budget": 1}
    found, expected = (reduced(backend, x, y, asked, asked, **more) for backend in ("triton", "reference"))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinities_in_hinges_means_and_the_largest(value):
    x, y = unit(70, 8), unit(90, 8, 1)
    x[3, 2] = value
    teacher = Teacher(unit(70, 8, 2), unit(90, 8, 3), 3.0)
    asked = [
        SoftmaxMean(),
        SoftmaxMean(under=teacher),
        SoftmaxMean(teacher),
        LogSumExp(of=Paced(1.0, 1.0, 0.5, 0.5)),
        CountAbove(0.1, Diagonal(1)),
        TopK(3),
        TopK(20),
    ]
    # A score of -inf has no weight in its column's mean, where the dense formula multiplies the two to NaN.
    found, expected = (reduced(backend, x, y, asked, asked[1:], scale=3.0) for backend in ("triton", "reference"))
    for k, (given, truth) in enumerate(zip(found, expected, strict=True)):
        assert all(map(torch.equal, kinds(given), kinds(truth))), f"result {k}"


@pytest.mark.parametrize("size", [0.0, 65_536.0])
def test_weights_larger_than_their_upstream_gradient(size):
    """A mean and a paced score multiply it by what scores differ; in float16 the products have no room for more."""
    x, y = unit(70, 16).half(), unit(70, 16, 1).half()
    taught = unit(70, 8, 2), unit(70, 8, 3)
    teacher = Teacher(*(each.half() for each in taught), 100.0)
    asked = [SoftmaxMean(sharpness=20.0), SoftmaxMean(teacher), LogSumExp(of=Paced(64.0, 1.0, 0.25, 0.25))]
    upstream = [size * each for each in torch.randn(3, 70, generator=torch.Generator().manual_seed(2))]
    given, truth = (
        outcome(backend, x, y, asked, (), upstream, dtype=dtype, scale=0.01)[3:5]
        for backend, dtype in (("triton", None), ("reference", torch.float64))
    )
    for one, other in zip(given, truth, strict=True):
        bound = torch.finfo(torch.float16).eps * other.norm() + 6e-8 * other.numel() ** 0.5
        assert (one.double() - other).norm() <= bound


def test_empty_matrices_have_no_largest_and_no_mean():
    asked = [SoftmaxMean(), HingeSum(), TopK(2), ArgTopK(2)]
    rows, cols = torch.zeros(3, 4), torch.zeros(0, 4)
    found, expected = (reduced(backend, rows, cols, asked, asked, scale=1.0) for backend in ("triton", "reference"))
    assert all(map(torch.equal, found, expected))
