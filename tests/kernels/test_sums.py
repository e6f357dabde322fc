"""`cross_entropy_sum` and `sigmoid_sum` against their formulas in float64: rectangles, offsets, targets, weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from against_float64 import assert_as_exact
from pairtile.kernels import Diagonal, SameId, Target
from pairtile.kernels.contrastive.sums import cross_entropy_sum, sigmoid_sum

SHAPES = [(33, 33, 0), (20, 41, 7), (41, 20, -9), (5, 60, 58), (30, 7, 3), (1, 1, 0), (6, 5, 40)]


def dense_sum(scores, pairs):
    """Sum over the rows that have a pair, in the form that does not cancel."""
    total = scores.sum() * 0
    for row, column in pairs:
        others = torch.cat([scores[row, :column], scores[row, column + 1 :]])
        if len(others):
            total = total + F.softplus(others.logsumexp(0) - scores[row, column])
    return total


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize(("n", "m", "offset"), SHAPES)
def test_cross_entropies_along_a_diagonal(backend, some, embeddings, n, m, offset, budget):
    pairs = [(i, i + offset) for i in range(n) if 0 <= i + offset < m]
    for row_weight, col_weight in ((1.0, 0.0), (0.0, 0.7), (0.5, 2.0)):

        def dense(logits, x, y, row_weight=row_weight, col_weight=col_weight):
            scores = logits(x, y)
            by_col = dense_sum(scores.T, [(j, i) for i, j in pairs])
            return row_weight * dense_sum(scores, pairs) + col_weight * by_col

        def ours(x, y, scale, weights=(row_weight, col_weight)):
            row_weight, col_weight = weights
            return cross_entropy_sum(
                x,
                y,
                scale=scale,
                pair=Diagonal(offset),
                row_weight=row_weight,
                col_weight=col_weight,
                memory_budget=budget,
            )

        for scale in some((1.0, 30.0)):
            assert_as_exact(ours, dense, embeddings(n, m, 9, seed=n), scale)


def test_cross_entropies_of_targets(backend, embeddings):
    columns = torch.tensor([3, 3, -1, 0, 18, 18, -100, 7])
    pairs = [(i, j) for i, j in enumerate(columns.tolist()) if j >= 0]

    def dense(logits, x, y):
        return 0.25 * dense_sum(logits(x, y), pairs)

    def ours(x, y, scale):
        return cross_entropy_sum(x, y, scale=scale, pair=Target(columns), row_weight=0.25)

    for scale in (1.0, 30.0):
        assert_as_exact(ours, dense, embeddings(8, 19, 9), scale)


@pytest.mark.parametrize("col_weight", [0.0, 1.5])
def test_a_temperature_for_each_row(backend, embeddings, col_weight):
    temperatures = torch.linspace(1, 20, 12, dtype=torch.float64)
    pairs = [(i, i + 2) for i in range(12)]

    def dense(logits, x, y, temperatures):
        # The scale of `assert_as_exact` is a factor on top.
        scores = temperatures.unsqueeze(1) * logits(x, y)
        return dense_sum(scores, pairs) + col_weight * dense_sum(scores.T, [(j, i) for i, j in pairs])

    def ours(x, y, temperatures, scale):
        return cross_entropy_sum(
            x, y, scale=temperatures * scale, pair=Diagonal(2), row_weight=1, col_weight=col_weight
        )

    assert_as_exact(ours, dense, [*embeddings(12, 15, 6), temperatures], 1.0)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize(("n", "m", "offset"), SHAPES)
def test_sigmoid_sums(backend, some, embeddings, n, m, offset, budget):
    signs = -torch.ones(n, m, dtype=torch.float64)
    signs.diagonal(offset)[:] = 1

    def dense(logits, x, y, bias):
        return -0.1 * F.logsigmoid(signs.to(x.dtype) * (logits(x, y) + bias)).sum()

    def ours(x, y, bias, scale):
        return sigmoid_sum(x, y, scale=scale, bias=bias, positive=Diagonal(offset), weight=0.1, memory_budget=budget)

    for scale, bias in some(((1.0, -3.0), (30.0, -10.0))):
        assert_as_exact(ours, dense, [*embeddings(n, m, 9, seed=n), torch.tensor([bias])], scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["both directions", "rows", "targets", "sigmoid"])
def test_any_number_of_threads_gives_the_same_bits(cpp, embeddings, kind, dtype):
    """Several tiles in both directions, so that threads have something to share."""
    leaves = [each.to(dtype).requires_grad_() for each in embeddings(531, 777, 65)]
    scale = torch.tensor(20.0, requires_grad=True)
    weights = {"row_weight": 0.5, "col_weight": 2.0 if kind == "both directions" else 0.0}
    pair = Target(torch.arange(531) * 5 % 777) if kind == "targets" else Diagonal(3)

    def outcome(threads):
        torch.set_num_threads(threads)
        if kind == "sigmoid":
            total = sigmoid_sum(*leaves, scale=scale, bias=-5.0)
        else:
            total = cross_entropy_sum(*leaves, scale=scale, pair=pair, **weights)
        return [total.detach(), *torch.autograd.grad(total, [*leaves, scale])]

    before = torch.get_num_threads()
    try:
        first, *others = (outcome(threads) for threads in (1, 2, 3))
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0)])
def test_sums_over_nothing_are_zero(backend, n, m):
    x, y = torch.zeros(n, 4, requires_grad=True), torch.zeros(m, 4, requires_grad=True)
    for total in (cross_entropy_sum(x, y, scale=1.0, row_weight=1, col_weight=1), sigmoid_sum(x, y, scale=1.0)):
        assert total.item() == 0
        for gradient in torch.autograd.grad(total, (x, y)):
            assert not gradient.any()


def test_arguments_that_do_not_fit_are_refused(backend):
    x = torch.zeros(3, 4)
    columns = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"col_weight=1.0 with Target: a column has no target"):
        cross_entropy_sum(x, x, scale=1.0, pair=Target(columns), col_weight=1.0)
    with pytest.raises(ValueError, match=r"Target.columns holds 3, but y has 3 rows"):
        cross_entropy_sum(x, x, scale=1.0, pair=Target(columns + 1))
    with pytest.raises(ValueError, match=r"Target.columns is a torch.int64 tensor of shape \[2\]"):
        cross_entropy_sum(x, x, scale=1.0, pair=Target(columns[1:]))
    with pytest.raises(TypeError, match=r"pair is SameId.*expected Diagonal\(...\) or Target\(...\)"):
        cross_entropy_sum(x, x, scale=1.0, pair=SameId(columns, columns))
    with pytest.raises(TypeError, match=r"positive is Target.*expected Diagonal\(...\)"):
        sigmoid_sum(x, x, scale=1.0, positive=Target(columns))
    for function in (cross_entropy_sum, sigmoid_sum):
        with pytest.raises(ValueError, match=r"x \[3, 4\] and y \[3, 5\] differ in their last dimension"):
            function(x, torch.zeros(3, 5), scale=1.0)
        with pytest.raises(TypeError, match=r"y is torch.int64"):
            function(x, x.long(), scale=1.0)
        with pytest.raises(ValueError, match=r"scale is a torch.float32 tensor of shape \[2\]"):
            function(x, x, scale=torch.ones(2))
        with pytest.raises(ValueError, match="memory_budget=0: expected a positive number of bytes"):
            function(x, x, scale=1.0, memory_budget=0)
