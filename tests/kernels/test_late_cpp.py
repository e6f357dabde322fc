"""The edges of late interaction in C++: borders of chunks, strips and panels, what is kept or not, threads, NaN, ties."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contenders import portable_product, threads
from torch import Tensor

from pairtile.kernels import project_max, use_backend
from pairtile.kernels.late_interaction import LogSumExpPooling, MaxPooling, SoftmaxPooling, token_scores
from pairtile.kernels.late_interaction.token_sets import TokenSets, packed_sets, padded_sets

pytestmark = pytest.mark.usefixtures("cpp")

POOLINGS = [MaxPooling(), SoftmaxPooling(0.5), LogSumExpPooling(0.5)]
# Sums of up to 1100 products in another order than float64 has them; gradients of 16-bit tokens are rounded once, by half
# an eps.
TOLERANCES = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

Batch = Callable[[Tensor], TokenSets]


def tokens(count: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    found = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return (found / width**0.5).to(dtype)


def packed(lengths: list[int]) -> Batch:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return lambda rows: packed_sets(rows, bounds, None, "sets")


def padded(mask: Tensor) -> Batch:
    return lambda rows: padded_sets(rows.view(*mask.shape, -1), mask, "sets")


def outcome(
    x: Tensor,
    y: Tensor,
    of_x: Batch,
    of_y: Batch,
    backend: str = "cpp",
    dtype: torch.dtype | None = None,
    **asked: object,
) -> list[Tensor]:
    """Scores of rows and columns, and the gradients of a sum of the finite ones with unlike weights."""
    x, y = (each.to(dtype or each.dtype).requires_grad_() for each in (x, y))
    with use_backend(backend):
        scores = token_scores(of_x(x), of_y(y), cols=True, **asked)  # type: ignore[arg-type]
        weights = torch.linspace(-1, 2, scores[0].numel()).view_as(scores[0]).to(scores[0].dtype)
        total = sum((each.masked_fill(each.isinf(), 0) * weights).sum() for each in scores)
        return [*(each.detach() for each in scores), *torch.autograd.grad(total, (x, y))]  # type: ignore[arg-type]


def check(found: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    for position, (value, expected) in enumerate(zip(found, truth, strict=True)):
        assert torch.equal(value.isinf(), expected.isinf())
        value, expected = (each.double().masked_fill(each.isinf(), 0) for each in (value, expected))
        # Scores are float32 whatever the tokens are.
        allowed = TOLERANCES[dtype if position >= 2 else torch.float32]
        assert (value - expected).norm() <= allowed * expected.norm().clamp(min=1e-3), position


# Chunks have 64 rows, strips 64 columns, panels at most 512 and of wide tokens 64; streamed blocks 12 rows. Set lengths lie
# on both sides of them.
LENGTHS = [0, 1, 11, 13, 64, 65, 129]


@pytest.mark.parametrize("pooling", POOLINGS, ids=["max", "softmax", "logsumexp"])
@pytest.mark.parametrize(
    ("longest", "width", "dtype"),
    [
        (530, 1, torch.float32),
        (530, 7, torch.bfloat16),
        (70, 8, torch.float16),
        (70, 300, torch.bfloat16),
        (70, 1100, torch.float32),
    ],
)
def test_lengths_at_the_borders_of_chunks(pooling, longest, width, dtype):
    lengths = [longest, 0, 1, 13, 65]
    of_x, of_y = packed(lengths), packed(LENGTHS)
    x, y = tokens(sum(lengths), width, 0, dtype), tokens(sum(LENGTHS), width, 1, dtype)
    truth = outcome(x, y, of_x, of_y, "reference", torch.float64, pooling=pooling)
    check(outcome(x, y, of_x, of_y, pooling=pooling), truth, dtype)
    with portable_product(True):
        # And nothing is kept, and the other side is packed a panel at a time.
        check(outcome(x, y, of_x, of_y, pooling=pooling, memory_budget=1), truth, dtype)


@pytest.mark.parametrize("pooling", POOLINGS, ids=["max", "softmax", "logsumexp"])
def test_candidates_with_scattered_masks(pooling):
    generator = torch.Generator().manual_seed(0)
    x_mask = torch.rand(3, 70, generator=generator) < 0.7
    y_mask = torch.rand(6, 150, generator=generator) < torch.tensor([0.03, 1.0, 0.5, 0.9, 0.0, 0.7])[:, None]
    x_mask[2] = False
    x, y = tokens(3 * 70, 40, 0), tokens(6 * 150, 40, 1)
    x[~x_mask.flatten()], y[~y_mask.flatten()] = torch.nan, torch.nan
    truth = outcome(x, y, padded(x_mask), padded(y_mask), "reference", torch.float64, pooling=pooling, candidates=2)
    for budget in (None, 1):
        found = outcome(x, y, padded(x_mask), padded(y_mask), pooling=pooling, candidates=2, memory_budget=budget)
        check(found, truth, torch.float32)


@pytest.mark.parametrize("pooling", POOLINGS, ids=["max", "softmax", "logsumexp"])
def test_the_number_of_threads_changes_no_bit(pooling):
    of_x, of_y = packed([40, 3, 200, 17] * 3), packed([65, 130, 5] * 4)
    x, y = tokens(780, 96, 0), tokens(800, 96, 1)
    with threads(1):
        truth = outcome(x, y, of_x, of_y, pooling=pooling)
    for count in (2, 3):
        with threads(count):
            found = outcome(x, y, of_x, of_y, pooling=pooling)
        assert all(torch.equal(value, expected) for value, expected in zip(found, truth, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_choose_the_first_token(dtype):
    """Small integers multiply exactly; twins of a token follow it in other strips and chunks."""
    x = torch.randint(-2, 3, (160, 6), generator=torch.Generator().manual_seed(0)).repeat(2, 1).to(dtype)
    y = torch.randint(-2, 3, (90, 6), generator=torch.Generator().manual_seed(1)).repeat(2, 1).to(dtype)
    of_x, of_y = packed([320]), packed([100, 80])
    found = outcome(x, y, of_x, of_y, pooling=MaxPooling())
    truth = outcome(x, y, of_x, of_y, "reference", torch.float64, pooling=MaxPooling())
    # Of a wrong choice at least one entry is wrong by an upstream gradient; float32 sums of hundreds are off by eps.
    for value, expected in zip(found, truth, strict=True):
        assert (value.double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.parametrize("pooling", POOLINGS, ids=["max", "softmax", "logsumexp"])
def test_nan_in_a_real_token_reaches_its_own_scores_alone(pooling):
    y = tokens(5 * 80, 24, 1)
    y[2 * 80 + 70, 5] = torch.nan
    x, of_x, of_y = tokens(4 * 20, 24, 0), packed([20] * 4), packed([80] * 5)
    for grad in (True, False):  # the search with positions, and that without
        with torch.set_grad_enabled(grad):
            rows, cols = token_scores(of_x(x.requires_grad_()), of_y(y), pooling=pooling, cols=True)
            (alone,) = token_scores(of_x(x), of_y(y), pooling=pooling)
        for scores in (rows, cols, alone):
            assert scores[:, 2].isnan().all()
            assert not scores[:, [0, 1, 3, 4]].isnan().any()


def test_scoring_alone_gives_the_scores_of_training():
    """One query is streamed past the documents where no choice is asked for."""
    mask = torch.rand(9, 150, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[1], mask[3, 1:] = False, False
    for dtype in TOLERANCES:
        for width in (32, 33):
            x, y = tokens(50, width, 0, dtype), tokens(9 * 150, width, 1, dtype)
            y[~mask.flatten()] = torch.nan
            for of_x in (packed([50]), packed([20, 0, 30])):
                (alone,) = token_scores(of_x(x), padded(mask)(y), pooling=MaxPooling())
                truth = outcome(x, y, of_x, padded(mask), "reference", torch.float64, pooling=MaxPooling())
                check([alone], truth[:1], dtype)


def test_a_projection_wider_than_a_panel():
    hidden, weight = tokens(3 * 70, 40, 0).view(3, 70, 40), tokens(1500, 40, 1)
    mask = torch.rand(3, 70, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[1] = False
    upstream = torch.randn(3, 1500, generator=torch.Generator().manual_seed(3)).relu()  # zeros, as log1p-relu leaves

    def results(backend: str, dtype: torch.dtype, budget: int | None) -> list[Tensor]:
        leaves = [each.to(dtype).requires_grad_() for each in (hidden, weight)]
        with use_backend(backend):
            values = project_max(*leaves, mask=mask, memory_budget=budget)
        total = (values.masked_fill(values.isinf(), 0) * upstream).sum()
        return [values.detach(), values.detach(), *torch.autograd.grad(total, leaves)]

    truth = results("reference", torch.float64, None)
    for budget in (1, 2**16, None):
        check(results("cpp", torch.float32, budget), truth, torch.float32)


def test_sets_that_leave_the_matrix_are_refused():
    x, starts, lengths = tokens(8, 4, 0), torch.tensor([0, 4]), torch.tensor([4, 5])
    sets = TokenSets(x, starts, lengths, None, 5, None)
    with pytest.raises(RuntimeError, match="set 1 has the rows 4 to 9 of 8 tokens"):
        token_scores(sets, sets, pooling=MaxPooling())
