"""Means under a softmax, teachers, hinges, counts and the largest: each against its formula written out, and at its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pairtile.kernels import (
    AbovePositive,
    ArgMax,
    ArgTopK,
    ColumnRange,
    CountAbove,
    Diagonal,
    HingeSum,
    LogSumExp,
    Max,
    Paced,
    PairScore,
    SameId,
    SoftmaxMean,
    Target,
    Teacher,
    TopK,
    similarity_reduce,
    use_backend,
)


def integers(n, m, d=4, seed=0, dtype=torch.float32):
    """Features whose scores are small whole numbers, exact in every dtype, and many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-2, 3, (rows, d), generator=generator).to(dtype) for rows in (n, m))


def ids(n, m, kinds=5):
    return SameId(torch.arange(n) % kinds, torch.arange(m) // 2 % kinds)


def finite_sum(results):
    """Of what has a gradient, at what is finite."""
    return sum(each.masked_fill(each.isinf(), 0).square().sum() for each in results if each.requires_grad)


# ---- the largest ----------------------------------------------------------------------------------------------------


def dense_largest(scores, k, dim):
    """Values and indices, the lowest index first among equals; -inf and -1 where there is no pair."""
    scores = F.pad(scores if dim == 1 else scores.T, (0, k), value=-torch.inf)
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k].masked_fill(values[:, :k].isinf(), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [1, None])  # on torch: tiles of 16 rows (and, of bfloat16, 16 columns), or one
def test_among_equals_the_lowest_index_comes_first(backend, dtype, budget):
    n, m = 37, 150
    x, y = integers(n, m, dtype=dtype)
    y[70:140] = y[:70]  # in other tiles, too
    asked = [each(*k, rule) for rule in (None, ids(n, m)) for each, k in ((TopK, (6,)), (ArgTopK, (6,)), (ArgMax, ()))]
    rows, cols = similarity_reduce(x, y, scale=2.0, rows=asked, cols=asked, memory_budget=budget)
    scores = 2 * (x.double() @ y.double().T)
    allowed = ids(n, m).rows[:, None] != ids(n, m).cols
    for dim, found in ((1, rows), (0, cols)):
        for at, given in ((0, scores), (3, scores.masked_fill(~allowed, -torch.inf))):
            values, indices = dense_largest(given, 6, dim)
            assert torch.equal(found[at].double(), values)
            assert torch.equal(found[at + 1], indices)
            assert torch.equal(found[at + 2], indices[:, 0])


@pytest.mark.parametrize("k", [1, 3, 64])
def test_where_all_are_equal_indices_ascend(backend, k):
    x, y = torch.ones(3, 2), torch.ones(70, 2)
    (indices,), (of_columns, largest) = similarity_reduce(
        x, y, scale=1.0, rows=[ArgTopK(k, Diagonal())], cols=[ArgTopK(k), Max()]
    )
    for i, row in enumerate(indices.tolist()):
        assert row == [j for j in range(k + 1) if j != i][:k]
    assert of_columns.tolist() == [[*range(min(k, 3)), *[-1] * (k - 3)]] * 70
    assert largest.tolist() == [2.0] * 70


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_of_the_largest_goes_to_the_chosen_pairs(dtype, per_row):
    """All operands, rows and columns, fewer pairs than k, strided features, a budget of several parts of D."""
    torch.manual_seed(0)
    n, m, d, exact = 9, 12, 70, torch.float64 if dtype == torch.float64 else torch.float32
    x, y = torch.randn(n, 2 * d).to(dtype)[:, ::2], torch.randn(d, m).to(dtype).T
    vectors = torch.rand(n) + 1 if per_row else torch.tensor(2.0), torch.tensor(0.5), torch.randn(n), torch.randn(m)
    leaves = [each.requires_grad_() for each in (x, y, *(each.to(exact) for each in vectors))]
    upstream = torch.randn(n, 20, dtype=exact), torch.randn(m, 4, dtype=exact)

    def gradients(backend, leaves):
        x, y, scale, bias, row_bias, col_bias = leaves
        with use_backend(backend):
            (of_rows,), (of_columns,) = similarity_reduce(
                x,
                y,
                scale=scale,
                bias=bias,
                row_bias=row_bias,
                col_bias=col_bias,
                rows=[TopK(20, Diagonal())],
                cols=[TopK(4, ColumnRange(3, 5))],
                memory_budget=1,
            )
        total = sum(
            (scores.masked_fill(scores.isinf(), 0) * each).sum()
            for scores, each in zip((of_rows, of_columns), upstream)
        )
        return torch.autograd.grad(total, leaves)

    truth = gradients("reference", [each.detach().double().requires_grad_() for each in leaves])
    for given, expected, leaf in zip(gradients("torch", leaves), truth, leaves, strict=True):
        assert given.dtype == leaf.dtype
        # Two directions, each rounded once to the dtype of the features, and their sum.
        tolerance = {torch.float64: 1e-12, torch.float32: 3e-6}.get(given.dtype, 2 * torch.finfo(given.dtype).eps)
        torch.testing.assert_close(
            given.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


def test_only_wanted_gradients_of_the_largest(backend):
    x, y = integers(5, 6)
    for wanted in range(4):
        leaves = [x.clone(), y.clone(), torch.tensor(2.0), torch.tensor(0.5)]
        leaves[wanted].requires_grad_()
        (scores,), _ = similarity_reduce(*leaves[:2], scale=leaves[2], bias=leaves[3], rows=[TopK(2)])
        scores.sum().backward()
        assert leaves[wanted].grad.isfinite().all()
        assert not any(each.requires_grad for k, each in enumerate(leaves) if k != wanted)


def test_a_second_derivative_of_the_largest_is_refused_clearly(backend):
    x, y = (each.requires_grad_() for each in integers(4, 5))
    (scores,), _ = similarity_reduce(x, y, scale=2.0, rows=[TopK(2)])
    (gradient,) = torch.autograd.grad(scores.square().sum(), x, create_graph=True)
    if backend == "reference":
        gradient.sum().backward()
        return
    with pytest.raises(RuntimeError, match=f"cannot be differentiated twice on the {backend} backend"):
        gradient.sum().backward()


class Seen(TorchDispatchMode):
    """The largest number of bytes in any new storage, and the shapes that were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm:
            self.products.append((*args[0].shape, args[1].shape[1]))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return result


def test_the_largest_copy_no_features():
    n, m, d, k = 200, 300, 64, 40
    x, y = torch.randn(n, d, requires_grad=True), torch.randn(m, d, requires_grad=True)
    with use_backend("torch"):
        (of_rows,), (of_columns,) = similarity_reduce(x, y, scale=1.0, rows=[TopK(k)], cols=[TopK(k)])
        with Seen() as seen:
            (of_rows.sum() + of_columns.sum()).backward()
    assert seen.bytes <= 8 * m * k, "indices of the pairs are the largest; the features of N k pairs are 64 times more"


# ---- hinges and counts ----------------------------------------------------------------------------------------------


def dense_hinge(scores, margin, own, excluded):
    terms = (margin + scores - own).clamp(min=0)
    return terms.masked_fill(excluded, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hinges_against_sums_written_out(backend, dtype):
    """Row i's threshold is S_ii, column j's S_jj; a duplicate of the own pair counts, that pair itself never does."""
    n = 33
    x, y = integers(n, n, dtype=dtype)
    y[20:] = y[:13]
    rule, weights = ids(n, n), torch.arange(n) % 3 / 2
    leaves = [x.requires_grad_(), y.requires_grad_()]
    asked = [HingeSum(1.0), HingeSum(3.0, Diagonal(), rule, weights)]
    rows, cols = similarity_reduce(x, y, scale=1.0, rows=asked, cols=asked, memory_budget=1)
    exact = [each.detach().double().requires_grad_() for each in leaves]
    scores = exact[0] @ exact[1].T
    own, itself = scores.diagonal(), torch.eye(n, dtype=torch.bool)
    left_out = itself | (rule.rows[:, None] == rule.cols)
    expected = [
        dense_hinge(scores, 1.0, own[:, None], itself).sum(1),
        (dense_hinge(scores, 3.0, own[:, None], left_out) * weights).sum(1),
        dense_hinge(scores, 1.0, own, itself).sum(0),
        (dense_hinge(scores, 3.0, own, left_out) * weights[:, None]).sum(0),
    ]
    upstream = [torch.arange(n) % (k + 2) for k in range(4)]  # so that every sum is exact, in float16 too
    totals = [sum((a * b).sum() for a, b in zip(results, upstream)) for results in ((*rows, *cols), expected)]
    rounding = (
        1e-6 if backend == "triton" else 0.0
    )  # its scores are kept in base 2; which are above is exact all the same
    for given, truth in zip((*rows, *cols), expected, strict=True):
        torch.testing.assert_close(given.double(), truth, rtol=rounding, atol=rounding)
    for given, truth in zip(torch.autograd.grad(totals[0], leaves), torch.autograd.grad(totals[1], exact)):
        # Whole numbers and halves: exact where they fit the dtype, which float16 rounds to its eleven bits.
        assert torch.equal(given, truth.to(dtype))


def test_who_has_no_pair_has_no_hinge(backend):
    x, y = (each.requires_grad_() for each in integers(4, 6))
    targets = torch.tensor([2, -1, 5, -1])
    (hinge, count), (of_columns,) = similarity_reduce(
        x, y, scale=1.0, rows=[HingeSum(9.0, Target(targets)), CountAbove(-9.0, Target(targets))], cols=[HingeSum(9.0)]
    )
    scores = x.detach() @ y.detach().T
    for i, j in enumerate(targets.tolist()):
        others = [9 + float(scores[i, c] - scores[i, j]) for c in range(6) if c != j] if j >= 0 else []
        # relative, as the scores of triton are kept in base 2
        assert hinge[i].item() == pytest.approx(sum(max(0.0, each) for each in others), rel=1e-6)
        assert count[i].item() == sum(each > 0 for each in others)
    assert of_columns[4:].tolist() == [0.0, 0.0]
    (hinge.sum() + of_columns.sum()).backward()
    assert x.grad[1].isfinite().all()
    assert not count.requires_grad


def test_the_count_is_the_rank_of_the_positive(backend):
    n, m = 30, 50
    x, y = integers(n, m, seed=1)
    positive = torch.arange(n) * 7 % m
    (count, among_others, weighed), (of_columns,) = similarity_reduce(
        x,
        y,
        scale=-3.0,
        rows=[
            CountAbove(0.0, Target(positive)),
            CountAbove(0.0, Target(positive), ids(n, m)),
            CountAbove(6.0, Target(positive), weights=torch.arange(m) / 2),
        ],
        cols=[CountAbove()],
    )
    scores = -3 * (x @ y.T)
    own = scores.gather(1, positive[:, None])
    others = ids(n, m).rows[:, None] != ids(n, m).cols
    assert torch.equal(count, (scores > own).sum(1).float())
    assert torch.equal(among_others, ((scores > own) & others).sum(1).float())
    assert torch.equal(weighed, ((scores > own + 6) * torch.arange(m) / 2).sum(1))
    assert torch.equal(of_columns[:n], (scores[:, :n] > scores[:, :n].diagonal()).sum(0).float())
    assert not of_columns[n:].any()


# ---- means under a softmax, and teachers ------------------------------------------------------------------------------


def test_a_loss_that_nobody_provides(backend, embeddings, relative_error):
    """The entropy of each row's softmax over the other ids, LSE minus the mean of S under it, in its dense formula."""
    n, m = 60, 45
    x, y = (each.float() for each in embeddings(n, m, 16))
    scale, weights, apart = torch.tensor(14.3), torch.rand(n), ids(n, m)
    leaves = [each.requires_grad_() for each in (x, y, scale)]
    (lse, mean), _ = similarity_reduce(
        x, y, scale=scale, rows=[LogSumExp(apart), SoftmaxMean(exclude=apart)], memory_budget=5000
    )
    loss = (weights * (lse - mean)).sum()
    exact = [each.detach().double().requires_grad_() for each in leaves]
    logits = (exact[2] * exact[0] @ exact[1].T).masked_fill(apart.rows[:, None] == apart.cols, -1e9)
    log_probabilities = logits.log_softmax(1)
    truth = -(weights.double()[:, None] * log_probabilities.exp() * log_probabilities).sum()
    # float32: LSE and mean, of size 14, leave a difference of size 3; the gradient's terms cancel as much.
    assert relative_error(loss, truth) < 2e-6
    for given, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact)):
        assert relative_error(given, expected) < 5e-6


def test_distillation_from_two_teachers_is_its_cross_entropy(backend, embeddings, relative_error):
    """Both directions of both teachers, of another width and of 16 bits; they have no gradient, though one asks for it."""
    n, m = 40, 33
    x, y = (each.float().requires_grad_() for each in embeddings(n, m, 8))
    wide = [each.to(torch.bfloat16) for each in embeddings(n, m, 70, seed=1)]
    teachers = [
        Teacher(*wide, 25.0),
        Teacher(*(each.float().requires_grad_() for each in embeddings(n, m, 3, seed=2)), torch.rand(n) + 9),
    ]
    asked = [LogSumExp(), *(SoftmaxMean(under=each) for each in teachers)]
    with_own = [*asked, LogSumExp(of=teachers[0]), SoftmaxMean(teachers[0], teachers[1], 0.5), Max(of=teachers[1])]
    rows, cols = similarity_reduce(x, y, scale=20.0, rows=with_own, cols=asked, memory_budget=10_000)
    exact = [each.detach().double().requires_grad_() for each in (x, y)]
    scores = 20 * exact[0] @ exact[1].T
    taught = [
        torch.as_tensor(each.scale).double().reshape(-1, 1) * (each.x.detach().double() @ each.y.detach().double().T)
        for each in teachers
    ]
    loss, truth = 0, 0
    for dim, (lse, *means) in ((1, rows[:3]), (0, cols)):
        for mean, scores_of_teacher in zip(means, taught, strict=True):
            expected = -(scores_of_teacher.softmax(dim) * scores.log_softmax(dim)).sum(dim)
            assert relative_error(lse - mean, expected) < 2e-6
            loss, truth = loss + (lse - mean).sum(), truth + expected.sum()
    for given, expected in zip(torch.autograd.grad(loss, (x, y), retain_graph=True), torch.autograd.grad(truth, exact)):
        assert relative_error(given, expected) < 5e-6  # a difference of two softmaxes, near each other here
    assert relative_error(rows[3], taught[0].logsumexp(1)) < 2e-6
    assert relative_error(rows[4], ((taught[1] / 2).softmax(1) * taught[0]).sum(1)) < 2e-6
    assert relative_error(rows[5], taught[1].amax(1)) < 2e-6
    of_teachers = sum(each.sum() for each in rows[3:]) + 0 * x.sum()
    gradients = torch.autograd.grad(of_teachers, (x, y, teachers[1].x), materialize_grads=True)
    assert not any(each.any() for each in gradients)


def test_rules_of_a_teachers_reduction_compare_the_scores_themselves(backend):
    x, y = integers(12, 12)
    teacher = Teacher(*integers(12, 12, seed=1))
    above = AbovePositive()
    (lse, largest), _ = similarity_reduce(
        x, y, scale=1.0, rows=[LogSumExp(above, of=teacher), ArgMax(above, of=teacher)]
    )
    scores, taught = x @ y.T, teacher.x @ teacher.y.T
    left = taught.masked_fill(scores > scores.diagonal()[:, None], -torch.inf)
    torch.testing.assert_close(lse, left.logsumexp(1))
    assert torch.equal(largest, left.argmax(1))


def test_a_teacher_is_multiplied_once_for_each_tile():
    n, m = 48, 40
    x, y = torch.randn(n, 8, requires_grad=True), torch.randn(m, 8)
    teacher = Teacher(torch.randn(n, 5), torch.randn(m, 5))
    of_it = [SoftmaxMean(under=teacher), SoftmaxMean(teacher), LogSumExp(of=teacher), TopK(2, of=teacher)]
    tile = lambda width: (16, width, m)  # noqa: E731
    with use_backend("torch"):
        with Seen() as forward:
            rows, cols = similarity_reduce(x, y, scale=1.0, rows=of_it, cols=of_it, memory_budget=1)
        with Seen() as backward:
            (rows[0].sum() + rows[1].sum() + cols[0].sum()).backward()
        with Seen() as alone:  # S itself is of no interest
            similarity_reduce(x, y, scale=1.0, rows=of_it[2:], memory_budget=1)
    assert forward.products == backward.products == [tile(8), tile(5)] * 3
    assert alone.products == [tile(5)] * 3


def test_teachers_are_within_the_memory_budget():
    n, m, budget = 700, 900, 600_000
    x, y = torch.randn(n, 16, requires_grad=True), torch.randn(m, 16)
    teachers = [Teacher(torch.randn(n, 16), torch.randn(m, 16)) for _ in range(3)]
    asked = [SoftmaxMean(under=each) for each in teachers]
    with use_backend("torch"), Seen() as seen:
        (*means, lse), _ = similarity_reduce(x, y, scale=1.0, rows=[*asked, LogSumExp()], memory_budget=budget)
        (sum(means) - lse).sum().backward()
    # Four tiles, in half the budget. The features are the next largest.
    assert 4 * m * 16 < seen.bytes <= budget // 8


# ---- edges ----------------------------------------------------------------------------------------------------------


def everything(n, m, dim):
    """Every reduction that this file is about, in one direction."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(rows, 3, generator=generator) for rows in (n, m))
    teacher, rule = Teacher(x, y, torch.rand(n, generator=generator)), ids(n, m, 3)
    weights = torch.rand((n, m)[dim], generator=generator)
    return [
        *(SoftmaxMean(of, under, k, rule) for of in (None, teacher) for under, k in ((None, -0.7), (teacher, 1.0))),
        SoftmaxMean(weights=weights.masked_fill(weights < 0.3, 0)),
        LogSumExp(rule, weights, teacher),
        LogSumExp(of=Paced(2.0, -1.0, 1.25, 0.75)),
        HingeSum(0.3, Diagonal(1)),
        CountAbove(-0.3, exclude=rule),
        PairScore(),
        TopK(3, rule),
        ArgTopK(3, rule),
        TopK(2, of=teacher),
        Max(rule),
    ]


def with_gradients(n, m, dtype, scale, **options):
    generator = torch.Generator().manual_seed(4)
    vectors = [torch.randn(size, generator=generator) for size in ((n, 5), (m, 5), (), (n,), (m,))]
    leaves = [each.to(dtype).requires_grad_() for each in (*vectors[:2], torch.full(scale, 2.0), *vectors[2:])]
    x, y, factor, bias, row_bias, col_bias = leaves
    rows, cols = similarity_reduce(
        x,
        y,
        scale=factor * torch.linspace(1, 2, n, dtype=dtype) if scale else factor,
        bias=bias,
        row_bias=row_bias,
        col_bias=col_bias,
        rows=everything(n, m, 1),
        cols=everything(n, m, 0),
        **options,
    )
    total = finite_sum((*rows, *cols)) + 0 * x.sum()
    return [*rows, *cols], torch.autograd.grad(total, leaves, materialize_grads=True)


@pytest.mark.parametrize(
    ("n", "m", "scale"), [(37, 23, (37,)), (5, 50, ()), (1, 1, ()), (1, 4, (1,)), (0, 3, ()), (3, 0, (3,)), (0, 0, ())]
)
def test_every_shape_equals_the_dense_formula(backend, dtype, n, m, scale):
    results, gradients = with_gradients(n, m, dtype, scale, memory_budget=1)
    with use_backend("reference"):
        expected, expected_gradients = with_gradients(n, m, torch.float64, scale)
    # float64: only the order of summation differs. float32: sums of up to 50 terms of size 10, which may cancel.
    rtol, atol = (1e-11, 1e-11) if dtype == torch.float64 else (3e-6, 3e-5)
    for given, truth in zip([*results, *gradients], [*expected, *expected_gradients], strict=True):
        if given.dtype == torch.int64:
            assert torch.equal(given, truth)
        else:
            size = max([1.0, *truth.masked_fill(truth.isinf(), 0).abs().flatten().tolist()])
            torch.testing.assert_close(given.double(), truth, rtol=rtol, atol=atol * size)


def test_whoever_is_left_without_a_pair_has_a_gradient_of_zero(backend):
    x, y = (each.requires_grad_() for each in integers(3, 4))
    nobody = ColumnRange(0, 4)
    teacher = Teacher(x, y, 2.0)
    asked = [
        SoftmaxMean(exclude=nobody),
        SoftmaxMean(under=teacher, exclude=nobody),
        HingeSum(5.0, exclude=nobody),
        CountAbove(-5.0, exclude=nobody),
        LogSumExp(nobody, of=teacher),
        LogSumExp(nobody, of=Paced(1.0, 1.0, 0.0, 0.0)),
        Max(nobody),
        TopK(2, nobody),
        ArgTopK(2, nobody),
    ]
    rows, cols = similarity_reduce(x, y, scale=1.0, rows=asked, cols=asked)
    for results in (rows, cols):
        assert not any(each.any() for each in results[:4])
        assert all((each == -torch.inf).all() for each in results[4:8])
        assert (results[8] == -1).all()
    gradients = torch.autograd.grad(sum(each.sum() for each in (*rows, *cols) if each.requires_grad), (x, y))
    assert not any(each.any() for each in gradients)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_scores_overflow_nothing(backend, embeddings, relative_error, size):
    x, y = (each.float().requires_grad_() for each in embeddings(20, 24, 8))
    teacher = Teacher(*(each.float() for each in embeddings(20, 24, 8, seed=1)), 1e4)
    asked = [
        SoftmaxMean(),
        SoftmaxMean(teacher),
        SoftmaxMean(under=teacher),
        LogSumExp(of=teacher),
        HingeSum(),
        TopK(3),
    ]
    rows, cols = similarity_reduce(x, y, scale=size, rows=asked, cols=asked)
    with use_backend("reference"):
        expected = similarity_reduce(x.double(), y.double(), scale=size, rows=asked, cols=asked)
    for given, truth in zip((*rows, *cols), (*expected[0], *expected[1]), strict=True):
        # The scores carry a relative error of a few 1e-7, and no softmax here is near a tie.
        assert relative_error(given, truth, size=1.0) < 2e-6
    assert all(each.isfinite().all() for each in torch.autograd.grad(finite_sum((*rows, *cols)), (x, y)))
