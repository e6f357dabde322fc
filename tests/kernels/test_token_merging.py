"""Matchings index by index against the papers, and merges in value and gradient."""

from __future__ import annotations

import random

import pytest
import token_merging as papers
import torch
from torch import Tensor

from pairtile.kernels.token_merging import (
    Matching,
    bipartite_matching,
    bipartite_soft_matching,
    complete_graph_matching,
    complete_graph_soft_matching,
    kth_bipartite_soft_matching,
    merge_source,
    merge_tokens,
    merge_wavg,
    pitome_margin,
    pitome_matching,
    random_bipartite_soft_matching,
)

# Rounding of float32 cosines and of their means, with room: closer candidates may be taken in either order.
CLOSE = 1e-6


def exact_metric(choose: random.Random, batch: int, tokens: int) -> Tensor:
    """Signs, of a width whose root is a power of two: cosines are multiples of 1/16, exact; half the tokens are copies."""
    metric = torch.randint(0, 2, (batch, tokens, 16)) * 2.0 - 1
    if tokens > 3:
        metric[:, torch.randint(tokens, (tokens // 2,))] = metric[:, torch.randint(tokens, (tokens // 2,))]
    return metric


def random_metric(choose: random.Random, batch: int, tokens: int) -> Tensor:
    """Cosines and energies apart by more than rounding, but for the one of two tokens that they share."""
    for _ in range(200):
        metric = torch.randn(batch, tokens, choose.choice([5, 16, 64]))
        if all(apart(each) for each in papers.cosines(metric)):
            return metric
    raise AssertionError(f"no metric of {tokens} tokens without close similarities")


def apart(scores: Tensor) -> bool:
    upper = scores[tuple(torch.triu_indices(*scores.shape, offset=1))]
    energies = torch.nn.functional.elu(scores - 0.45).mean(-1)
    return all(not len(each) > 1 or each.sort().values.diff().min() > CLOSE for each in (upper, energies))


def assert_same(matching: Matching, expected: papers.Indices) -> None:
    for found, right in zip((matching.kept, matching.sources, matching.places), expected, strict=True):
        assert found.tolist() == right


@pytest.fixture(params=range(12))
def case(request):
    """(metric [3, N, C], r, whether its cosines are exact)."""
    choose = random.Random(request.param)
    torch.manual_seed(request.param)
    tokens = choose.choice([1, 2, 3, 4, 5, 8, 9, 17, 18, 33])
    exact = request.param % 2 == 0
    metric = (exact_metric if exact else random_metric)(choose, 3, tokens)
    return metric, choose.choice([0, 1, 2, tokens // 3, tokens]), exact


@pytest.mark.parametrize(("class_token", "distill_token"), [(False, False), (True, False), (True, True)])
def test_tome_chooses_as_the_paper_says(backend, case, class_token, distill_token):
    metric, r, _ = case
    assert_same(
        bipartite_matching(metric, r, class_token, distill_token), papers.tome(metric, r, class_token, distill_token)
    )


@pytest.mark.parametrize("protected", [0, 1])
def test_pitome_chooses_as_the_paper_says(backend, case, protected):
    metric, r, exact = case
    if metric.shape[1] - protected < 3 and not exact:
        pytest.skip("two tokens have one energy but for rounding")
    # A margin below all cosines leaves sums of exact numbers, which float32 adds up without rounding.
    margin = -1.0 if exact else 0.45
    assert_same(
        pitome_matching(metric, r, margin, protected=protected), papers.pitome(metric, r, margin, protected=protected)
    )


def test_crossget_chooses_as_the_paper_says(backend, case):
    metric, r, _exact = case
    importance = torch.randint(0, 3, metric.shape[:2]).float()
    protected = torch.zeros(metric.shape[:2], dtype=torch.bool)
    protected[:, [0, -1]] = True
    protected[1, metric.shape[1] // 2] = True
    assert_same(
        complete_graph_matching(metric, r, importance, protected=protected),
        papers.crossget(metric, r, importance, protected),
    )


@pytest.mark.parametrize("tokens", [9, 10])
def test_every_number_of_tokens_that_can_go(backend, tokens):
    """Ties and copies, an odd and an even number of tokens; beyond half of them no more go."""
    torch.manual_seed(tokens)
    metric = exact_metric(random.Random(tokens), 2, tokens)
    importance = torch.randint(0, 2, metric.shape[:2]).float()
    protected = (torch.arange(tokens) == 0).expand(2, -1)
    for r in range(tokens // 2 + 2):
        for class_token in (False, True):
            assert_same(bipartite_matching(metric, r, class_token), papers.tome(metric, r, class_token))
        assert_same(pitome_matching(metric, r, -1.0), papers.pitome(metric, r, -1.0))
        found = complete_graph_matching(metric, r, importance, protected=1)
        assert_same(found, papers.crossget(metric, r, importance, protected))


def test_a_protected_token_is_no_destination(backend):
    for tokens in (3, 4, 5):
        matching = bipartite_matching(torch.randn(2, tokens, 8), 5, distill_token=True, protected=1)
        assert matching.sources.shape[1] == (tokens - 2) // 2
        assert (matching.places >= 2).all()


def test_registers_stay_in_front_unmerged(backend):
    metric = exact_metric(random.Random(0), 2, 14)
    for protected in (1, 2, 3, 5):
        matching = bipartite_matching(metric, 3, protected=protected)
        assert matching.kept.shape == (2, 11)
        assert (matching.kept[:, :protected] == torch.arange(protected)).all()
        assert (matching.sources >= protected).all()
        assert (matching.places >= protected).all()
        assert all(sorted(a + b) == list(range(14)) for a, b in zip(matching.kept.tolist(), matching.sources.tolist()))


# ---- merging ----------------------------------------------------------------------------------------------------------


def dense_merge(x: Tensor, matching: Matching, factors: Tensor, divide: bool) -> Tensor:
    """By a matrix [B, S, N] of zeros and factors."""
    batch, count = matching.kept.shape
    assigned = torch.zeros(batch, count, matching.tokens, dtype=x.dtype)
    assigned.scatter_(1, matching.place_of().unsqueeze(1), factors.to(x.dtype).unsqueeze(1))
    return assigned @ x if not divide else (assigned @ x) / assigned.sum(-1, keepdim=True)


def matchings(metric: Tensor) -> list[Matching]:
    importance = torch.rand(metric.shape[:2])
    return [
        bipartite_matching(metric, 4, True),
        pitome_matching(metric, 4, 0.3),
        complete_graph_matching(metric, 4, importance),
    ]


@pytest.mark.parametrize("width", [1, 8, 33, 768])
def test_averages_by_size_and_their_gradients(backend, width):
    torch.manual_seed(width)
    for matching in matchings(torch.randn(3, 13, 8)):
        x, size = torch.randn(3, 13, width), torch.randint(1, 9, (3, 13, 1)).float()
        leaf, truth = x.clone().requires_grad_(), x.double().requires_grad_()
        merged, sizes = merge_tokens(leaf, matching, size)
        weights = torch.ones(3, 13) if matching.weights is None else matching.weights
        totals = dense_merge(size.double(), matching, torch.ones(3, 13), divide=False)
        expected = dense_merge(truth, matching, size[..., 0] * weights, divide=False) / totals
        assert torch.equal(sizes, totals.float())
        upstream = torch.randn(merged.shape)
        # Sums of a few products in float32, rounded once.
        torch.testing.assert_close(merged.double(), expected, atol=1e-6, rtol=1e-6)
        (found,) = torch.autograd.grad(merged, leaf, upstream)
        (right,) = torch.autograd.grad(expected, truth, upstream.double())
        torch.testing.assert_close(found.double(), right, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "sum", "amax"])
def test_modes_of_merge(backend, mode):
    x = torch.randn(3, 13, 8, requires_grad=True)
    merge, _ = bipartite_soft_matching(torch.randn(3, 13, 8), 4, class_token=True)
    matching, merged = merge.matching, merge(x, mode=mode)
    for sample in range(3):
        for place in range(9):
            members = x[sample][matching.place_of()[sample] == place]
            expected = {"mean": members.mean(0), "sum": members.sum(0), "amax": members.amax(0)}[mode]
            torch.testing.assert_close(merged[sample, place], expected)
    (found,) = torch.autograd.grad(merged.sum(), x)
    assert found.isfinite().all()


def test_unmerge_restores_what_was_not_merged_exactly(backend, dtype):
    x = torch.randn(3, 13, 8, dtype=dtype, requires_grad=True)
    for matching in matchings(torch.randn(3, 13, 8)):
        merge, unmerge = (
            type(bipartite_soft_matching(x, 0)[0])(matching),
            type(bipartite_soft_matching(x, 0)[1])(matching),
        )
        restored = unmerge(merge(x))
        for sample in range(3):
            alone = set(range(9)) - set(matching.places[sample].tolist())
            tokens = [matching.kept[sample, place].item() for place in alone]
            assert torch.equal(restored[sample, tokens], x[sample, tokens])
        (found,) = torch.autograd.grad(restored.sum(), x)
        assert found.sum().isclose(torch.tensor(float(restored.numel()), dtype=dtype))


def test_nothing_to_take_away_changes_nothing(backend):
    x = torch.randn(2, 7, 8)
    for merge, unmerge in (
        bipartite_soft_matching(x, 0),
        bipartite_soft_matching(x[:, :1], 5, class_token=True),
        complete_graph_soft_matching(x, 0),
        kth_bipartite_soft_matching(x, 1),
        random_bipartite_soft_matching(x, 0),
    ):
        given = x[:, : merge.matching.tokens]
        assert merge(given) is given
        assert unmerge(given) is given


def test_kth_and_random_matchings_take_the_most_similar(backend):
    x = torch.randn(2, 11, 8)
    scores = papers.cosines(x)
    merge, _ = kth_bipartite_soft_matching(x, 3)
    assert merge(x).shape == (2, 5, 8)
    assert merge.matching.kept.tolist() == [[2, 5, 8, 9, 10]] * 2
    randomly, _ = random_bipartite_soft_matching(x, 4, generator=torch.Generator().manual_seed(0))
    for found in (merge.matching, randomly.matching):
        for b in range(2):
            allowed = found.kept[b][: 3 if found is merge.matching else None]
            expected = scores[b][found.sources[b]][:, allowed].argmax(-1)
            assert torch.equal(found.places[b], expected)


def test_sources_tell_which_tokens_a_token_stands_for(backend):
    x = torch.randn(2, 9, 8)
    first, _ = bipartite_soft_matching(x, 3)
    merged, size = merge_wavg(first, x)
    source = merge_source(first, x)
    second, _ = bipartite_soft_matching(merged, 2)
    _, size = merge_wavg(second, merged, size)
    source = merge_source(second, merged, source)
    assert source.shape == (2, 4, 9)
    assert torch.equal(source.sum(-1, keepdim=True), size)
    assert torch.equal(source.sum(1), torch.ones(2, 9))


def test_compiled_without_a_graph_break(backend):
    if backend == "triton":
        pytest.skip("the interpreter cannot be traced")
    x = torch.randn(2, 9, 8, requires_grad=True)

    def objective(x: Tensor) -> Tensor:
        merge, unmerge = bipartite_soft_matching(x, 3, True)
        merged, _ = merge_wavg(merge, x)
        guided, _ = merge_wavg(complete_graph_soft_matching(merged, 1, merged[..., 0])[0], merged)
        return guided.square().sum() + unmerge(merged).sum() + merge_tokens(x, pitome_matching(x, 2, 0.4))[0].sum()

    (found,) = torch.autograd.grad(torch.compile(objective, fullgraph=True)(x), x)
    (right,) = torch.autograd.grad(objective(x), x)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: bipartite_soft_matching(x[0], 1),
            ValueError,
            r"metric has shape \[7, 8\]: expected \[batch, tokens",
        ),
        (lambda x: bipartite_soft_matching(x.long(), 1), TypeError, "metric is torch.int64"),
        (lambda x: bipartite_soft_matching(x, -1), ValueError, "r=-1: expected a whole number of at least 0"),
        (lambda x: bipartite_soft_matching(x, 2)[0](x[:, :5]), ValueError, r"expected \[batch, 7, channels\]"),
        (lambda x: bipartite_soft_matching(x, 2)[0](x, mode="max"), ValueError, "mode='max': expected"),
        (lambda x: merge_tokens(x, bipartite_matching(x, 2), x), ValueError, r"expected \[2, 7, 1\]"),
        (lambda x: pitome_matching(x, 1, float("nan")), ValueError, "margin=nan: expected a finite number"),
        (lambda x: complete_graph_matching(x, 1, x), ValueError, "importance is"),
        (lambda x: complete_graph_matching(x, 1, protected=torch.ones(3)), ValueError, "protected is"),
        (lambda x: pitome_margin(12, 12), ValueError, "layer=12 of 12: expected a number from 0 to 11"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 7, 8))
