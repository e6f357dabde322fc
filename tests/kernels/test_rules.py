"""Pair rules, weights, biases and per-row temperatures: against loops written out pair by pair, and the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pairtile.kernels import (
    AbovePositive,
    ColumnRange,
    Diagonal,
    DifferentId,
    LogSumExp,
    PairScore,
    SameId,
    SoftplusSum,
    Target,
    similarity_reduce,
    use_backend,
)

N, M, D = 6, 7, 3
ROW_IDS = torch.tensor([0, 0, 1, 2, 1, 5])
COL_IDS = torch.tensor([0, 1, 1, 2, 0, 3, 4])
TARGETS = torch.tensor([3, -1, 0, 3, 6, 2])
WEIGHTS = {1: torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 0.25, 3.0]), 0: torch.tensor([1.5, 0.0, 0.1, 1.0, 2.0, 0.5])}

#: Each rule, and whether it names the pair (i, j).
RULES = {
    "diagonal": (Diagonal(1), lambda i, j: j == i + 1),
    "target": (Target(TARGETS), lambda i, j: TARGETS[i] == j),
    "same": (SameId(ROW_IDS, COL_IDS), lambda i, j: ROW_IDS[i] == COL_IDS[j]),
    "different": (DifferentId(ROW_IDS, COL_IDS), lambda i, j: ROW_IDS[i] != COL_IDS[j]),
    "range": (ColumnRange(2, 5), lambda i, j: 2 <= j < 5),
    "range beyond": (ColumnRange(-3, 99), lambda i, j: True),
    "no range": (ColumnRange(4, 2), lambda i, j: False),
}
UNIONS = [
    *([name] for name in RULES),
    ["diagonal", "target"],
    ["same", "range"],
    ["diagonal", "target", "range", "same"],
    ["different", "same"],
    [],
]


def random_inputs(seed: int = 0):
    torch.manual_seed(seed)
    x, y = torch.randn(N, D, dtype=torch.float64), torch.randn(M, D, dtype=torch.float64)
    scale, bias = 0.5 + torch.rand(N, dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    return [x, y, scale, bias, torch.randn(N, dtype=torch.float64), torch.randn(M, dtype=torch.float64)]


def call(inputs, rows=(), cols=(), **options):
    x, y, scale, bias, row_bias, col_bias = inputs
    rows, cols = similarity_reduce(
        x, y, scale=scale, bias=bias, row_bias=row_bias, col_bias=col_bias, rows=rows, cols=cols, **options
    )
    return [*rows, *cols]


def brute_force(scores, dim, kind, positive, excluded, weights):
    """One result for each owner: the sum written out over the pairs (i, j)."""
    results = []
    for owner in range(scores.shape[1 - dim]):
        total = 0.0
        for other in range(scores.shape[dim]):
            i, j = (owner, other) if dim == 1 else (other, owner)
            weight = 1.0 if weights is None else float(weights[other])
            if excluded(i, j):
                continue
            if kind is LogSumExp:
                total += weight * math.exp(scores[i, j])
            else:
                z = 1 if positive(i, j) else -1
                total += weight * math.log1p(math.exp(-z * scores[i, j]))
        results.append((math.log(total) if total else -math.inf) if kind is LogSumExp else total)
    return torch.tensor(results, dtype=torch.float64)


def dense_scores(inputs):
    x, y, scale, bias, row_bias, col_bias = inputs
    return scale[:, None] * (x @ y.T) + bias + row_bias[:, None] + col_bias


def named_by(names):
    return lambda i, j: any(bool(RULES[name][1](i, j)) for name in names)


def rules_of(names):
    rules = tuple(RULES[name][0] for name in names)
    return rules[0] if len(rules) == 1 else rules


def assert_as_exact_as(dtype, given, truth):
    # float64: the order of summation alone differs. float32: rounding of inputs' products and sums of a few terms.
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(given.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("names", UNIONS, ids="+".join)
@pytest.mark.parametrize("weighted", [False, True])
def test_rules_against_sums_written_out(backend, dtype, names, weighted):
    inputs = [each.to(dtype) for each in random_inputs()]
    scores = dense_scores([each.double() for each in inputs])
    none = lambda i, j: False  # noqa: E731
    for dim in (1, 0):
        weights = WEIGHTS[dim] if weighted else None
        asked = [
            LogSumExp(rules_of(names), weights),
            SoftplusSum(rules_of(names), None, weights),
            SoftplusSum(Diagonal(), rules_of(names), weights),
        ]
        expected = [
            brute_force(scores, dim, LogSumExp, none, named_by(names), weights),
            brute_force(scores, dim, SoftplusSum, named_by(names), none, weights),
            brute_force(scores, dim, SoftplusSum, lambda i, j: i == j, named_by(names), weights),
        ]
        given = call(inputs, rows=asked) if dim == 1 else call(inputs, cols=asked)
        for result, truth in zip(given, expected, strict=True):
            assert_as_exact_as(dtype, result, truth)


@pytest.mark.parametrize("pair", [Diagonal(), Diagonal(2), Diagonal(-1), Target(TARGETS)], ids=str)
def test_pair_scores(backend, dtype, pair):
    inputs = [each.to(dtype) for each in random_inputs(1)]
    scores = dense_scores([each.double() for each in inputs])
    partner = {i: i + pair.offset if isinstance(pair, Diagonal) else int(TARGETS[i]) for i in range(N)}
    expected = [scores[i, j] if 0 <= j < M else -math.inf for i, j in partner.items()]
    assert_as_exact_as(dtype, call(inputs, rows=[PairScore(pair)])[0], torch.tensor(expected, dtype=torch.float64))
    if isinstance(pair, Diagonal):
        rows = {j: i for i, j in partner.items()}
        expected = [scores[rows[j], j] if j in rows else -math.inf for j in range(M)]
        assert_as_exact_as(dtype, call(inputs, cols=[PairScore(pair)])[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("margin", [-0.5, 0.0, 0.7])
@pytest.mark.parametrize("pair", [Diagonal(), Diagonal(2), Diagonal(-3), Target(TARGETS)], ids=str)
def test_above_positive(backend, dtype, pair, margin):
    """The own pair never matches, also under a negative margin, and an owner without a pair matches nothing."""
    inputs = [each.to(dtype) for each in random_inputs(2)]
    scores = dense_scores([each.double() for each in inputs])
    partner = {i: i + pair.offset if isinstance(pair, Diagonal) else int(TARGETS[i]) for i in range(N)}
    partner = {i: j for i, j in partner.items() if 0 <= j < M}
    rule = AbovePositive(margin, pair)
    none = lambda i, j: False  # noqa: E731

    def above_row(i, j):
        return i in partner and j != partner[i] and scores[i, j] > scores[i, partner[i]] + margin

    rows_of = {j: i for i, j in partner.items()}

    def above_col(i, j):
        return j in rows_of and i != rows_of[j] and scores[i, j] > scores[rows_of[j], j] + margin

    # The test stays away from borderline pairs, which float32 may put on either side.
    for i, j in partner.items():
        apart = (scores[i] - scores[i, j] - margin).abs()
        assert apart[torch.arange(M) != j].min() > 1e-4
    directions = [(1, above_row)] + ([(0, above_col)] if isinstance(pair, Diagonal) else [])
    for dim, above in directions:
        asked = [LogSumExp(rule), SoftplusSum(rule), SoftplusSum(None, (rule, ColumnRange(0, 2)))]
        given = call(inputs, rows=asked) if dim == 1 else call(inputs, cols=asked)
        expected = [
            brute_force(scores, dim, LogSumExp, none, above, None),
            brute_force(scores, dim, SoftplusSum, above, none, None),
            brute_force(scores, dim, SoftplusSum, none, lambda i, j, a=above: a(i, j) or j < 2, None),
        ]
        for result, truth in zip(given, expected, strict=True):
            assert_as_exact_as(dtype, result, truth)


# ---- gradients, and bigger matrices, against the reference --------------------------------------------------------


def bigger_request(n, m):
    torch.manual_seed(3)
    ids = torch.randint(12, (n,)), torch.randint(12, (m,))
    target = Target(torch.randint(-1, m, (n,)))
    weights = {1: torch.rand(m).round(decimals=1), 0: torch.rand(n).round(decimals=1)}
    rows = [
        LogSumExp((SameId(*ids), target), weights[1]),
        LogSumExp(AbovePositive(0.1)),
        SoftplusSum((SameId(*ids), target, Diagonal(3)), ColumnRange(50, 80), weights[1]),
        PairScore(target),
    ]
    cols = [
        LogSumExp((DifferentId(*ids), Diagonal(-2)), weights[0]),
        SoftplusSum(AbovePositive(-0.2, Diagonal(1)), (target, ColumnRange(100, 105))),
        PairScore(Diagonal(5)),
    ]
    return rows, cols


def results_and_gradients(inputs, rows, cols, **options):
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    results = call(leaves, rows, cols, **options)
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=results[0].dtype)
    for result in results:
        upstream = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
        total = total + (result.masked_fill(result.isinf(), 0) * upstream).sum()
    return [*results, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("budget", [1, 60_000, None])
def test_everything_at_once_equals_the_reference(backend, dtype, embeddings, relative_error, budget):
    n, m = 133, 117
    x, y = embeddings(n, m, 9, seed=4)
    torch.manual_seed(0)
    scale, biases = 3 + torch.rand(n), (torch.tensor([0.4]), torch.randn(n), torch.randn(m))
    inputs = [each.to(dtype) for each in (x, y, scale, *biases)]
    rows, cols = bigger_request(n, m)
    given = results_and_gradients(inputs, rows, cols, memory_budget=budget)
    with use_backend("reference"):
        truth = results_and_gradients([each.double() for each in inputs], rows, cols)
    for result, expected in zip(given, truth, strict=True):
        finite = expected.isfinite()
        assert torch.equal(result.isfinite(), finite)
        # float64: only the order of summation differs. float32: test_exactness has the sharper bounds.
        bound = 1e-11 if dtype == torch.float64 else 5e-6
        assert relative_error(result[finite], expected[finite]) < bound


def test_gradcheck(backend, dtype):
    if dtype != torch.float64:
        pytest.skip("finite differences need float64")
    inputs = [each.requires_grad_() for each in random_inputs(6)]
    rules = (SameId(ROW_IDS, COL_IDS), Target(TARGETS))

    def sweep(*inputs):
        return tuple(
            call(
                inputs,
                rows=[LogSumExp(rules, WEIGHTS[1]), SoftplusSum(rules, Diagonal(1), WEIGHTS[1]), PairScore()],
                cols=[LogSumExp(Diagonal(), WEIGHTS[0]), SoftplusSum(AbovePositive(0.2), rules)],
                memory_budget=1,
            )
        )

    assert torch.autograd.gradcheck(sweep, inputs)


@pytest.mark.parametrize("wanted", range(6))
def test_the_gradient_of_one_input_alone(backend, dtype, wanted):
    inputs = [each.to(dtype) for each in random_inputs(7)]
    asked = [LogSumExp(Diagonal()), SoftplusSum(), PairScore()]
    every = [each.clone().requires_grad_() for each in inputs]
    expected = torch.autograd.grad(sum(each[:5].sum() for each in call(every, asked, asked)), every)[wanted]
    alone = [each.clone().requires_grad_(k == wanted) for k, each in enumerate(inputs)]
    sum(each[:5].sum() for each in call(alone, asked, asked)).backward()
    # The same sums, but an implementation may take another path where nothing else is wanted.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(alone[wanted].grad, expected, rtol=tolerance, atol=tolerance)
    assert all(leaf.grad is None for k, leaf in enumerate(alone) if k != wanted)


def test_every_shape_of_a_scale(backend, dtype):
    x, y, *_ = (each.to(dtype) for each in random_inputs())
    expected = call([x, y, 2.0, 0.0, None, None], [LogSumExp()])[0]
    for shape in ((), (1,), (N,), (N, 1)):
        scale = torch.full(shape, 2.0, dtype=torch.float32, requires_grad=True)
        (given,) = call([x, y, scale, 0.0, None, None], [LogSumExp()])
        torch.testing.assert_close(given, expected)
        given.sum().backward()
        assert scale.grad.shape == scale.shape
        assert scale.grad.dtype == torch.float32


def test_weights_and_thresholds_carry_no_gradient(backend, dtype):
    x, y, *_ = (each.to(dtype).requires_grad_() for each in random_inputs())
    weights = torch.rand(M, requires_grad=True)
    (lse,), _ = similarity_reduce(x, y, scale=1.0, rows=[LogSumExp(AbovePositive(0.1), weights)])
    lse.masked_fill(lse.isinf(), 0).sum().backward()
    assert weights.grad is None


def test_rows_whose_every_pair_is_left_out(backend, dtype):
    x, y, *_ = (each.to(dtype).requires_grad_() for each in random_inputs())
    none_left = [
        LogSumExp(ColumnRange(0, M)),
        LogSumExp(weights=torch.zeros(M)),
        LogSumExp(DifferentId(ROW_IDS, ROW_IDS.new_full((M,), 99))),
    ]
    rows, _ = similarity_reduce(x, y, scale=1.0, rows=[*none_left, SoftplusSum(None, ColumnRange(0, M))])
    for lse in rows[:3]:
        assert lse.tolist() == [-math.inf] * N
    assert rows[3].tolist() == [0.0] * N
    sum(each.sum() for each in rows).backward()
    assert x.grad.abs().sum() == y.grad.abs().sum() == 0


def test_no_columns_and_no_rows(backend, dtype):
    for n, m in ((0, 4), (4, 0), (0, 0)):
        x, y = torch.zeros(n, 3, dtype=dtype, requires_grad=True), torch.zeros(m, 3, dtype=dtype, requires_grad=True)
        ids = torch.zeros(n, dtype=torch.int64), torch.zeros(m, dtype=torch.int64)
        target = Target(torch.full((n,), -1))
        rules = (SameId(*ids), target, AbovePositive(), ColumnRange(0, 2))
        rows, cols = similarity_reduce(
            x,
            y,
            scale=torch.ones(n),
            row_bias=torch.zeros(n),
            col_bias=torch.zeros(m),
            rows=[LogSumExp(rules, torch.ones(m)), PairScore(target), SoftplusSum(rules)],
            cols=[LogSumExp(rules, torch.ones(n)), PairScore(), SoftplusSum(rules)],
        )
        assert [each.tolist() for each in rows] == [[-math.inf] * n, [-math.inf] * n, [0.0] * n]
        assert [each.tolist() for each in cols] == [[-math.inf] * m, [-math.inf] * m, [0.0] * m]
        sum(each.sum() for each in (*rows, *cols)).backward()
        assert x.grad.shape == x.shape


def test_metadata_written_to_before_the_backward_is_noticed():
    ids = ROW_IDS.clone()
    x, y, *_ = (each.requires_grad_() for each in random_inputs())
    with use_backend("torch"):
        (lse,), _ = similarity_reduce(x, y, scale=1.0, rows=[LogSumExp(SameId(ids, COL_IDS))])
    ids.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.sum().backward()


def test_rules_of_a_list_or_alone_are_the_same(backend, dtype):
    x, y, *_ = (each.to(dtype) for each in random_inputs())
    ways = [Diagonal(), (Diagonal(),), [Diagonal()], (Diagonal(), Diagonal())]
    results = [similarity_reduce(x, y, scale=1.0, rows=[LogSumExp(way), SoftplusSum(way)])[0] for way in ways]
    for first, second in itertools.pairwise(results):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
