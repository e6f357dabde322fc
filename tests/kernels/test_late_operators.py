"""Late interaction as users call it: forms, rules, errors, compilation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pairtile.kernels import (
    AttentionPooling,
    LogSumExpPooling,
    SoftmaxPooling,
    TopMeanPooling,
    filip_similarity,
    maxsim,
    maxsim_pairs,
    maxsim_topk,
    maxsim_varlen,
    project_max,
    use_backend,
)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integer_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Products and sums of these are exact in float32."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


# ---- forms ------------------------------------------------------------------------------------------------------------


def test_candidates_pairs_and_packed_sets_agree_with_all_pairs(backend):
    q, d = integer_tokens(3, 4, 8), integer_tokens(6, 5, 8, seed=1)
    d_mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5])[:, None]
    every = maxsim(q, d, None, d_mask)
    of_candidates = maxsim(q, d.view(3, 2, 5, 8), None, d_mask.view(3, 2, 5))
    assert torch.equal(of_candidates, torch.stack([every[i, 2 * i : 2 * i + 2] for i in range(3)]))
    assert torch.equal(maxsim_pairs(q, d[:3], None, d_mask[:3]), every.diagonal())
    packed = maxsim_varlen(
        q.flatten(0, 1),
        torch.arange(0, 13, 4, dtype=torch.int32),
        d[d_mask],
        F.pad(d_mask.sum(1).cumsum(0), (1, 0)),
    )
    assert torch.equal(packed, every)


def test_the_two_similarities_of_filip_are_two_maxsims(backend):
    x, y = integer_tokens(4, 3, 8), integer_tokens(5, 6, 8, seed=1)
    of_x, of_y = filip_similarity(x, y, aggregate="sum")
    assert torch.equal(of_x, maxsim(x, y))
    assert torch.equal(of_y, maxsim(y, x).T)
    mean_x, mean_y = filip_similarity(x, y)
    torch.testing.assert_close(mean_x, of_x / 3)
    torch.testing.assert_close(mean_y, of_y / 6)


def test_one_query_vector_against_sets_of_vectors(backend):
    """SORCE and the like: the largest cosine of one text vector with an image's several."""
    text, images = tokens(3, 1, 8), tokens(4, 5, 8, seed=1)
    expected = F.cosine_similarity(text[:, :, None].expand(3, 1, 4, 8)[:, 0, :, None], images[None], dim=-1).amax(-1)
    torch.testing.assert_close(maxsim(text, images, normalize=True), expected, atol=1e-6, rtol=1e-5)


def test_weights_are_factors_of_the_query_tokens_terms(backend, dtype):
    q, d, logits = (
        tokens(*shape, seed=k).to(dtype).requires_grad_() for k, shape in enumerate([(3, 4, 8), (5, 6, 8), (3, 4)])
    )
    weights = logits.softmax(-1)
    terms = torch.einsum("ipd,jrd->ijpr", q, d).amax(-1) * weights[:, None]
    leaves = [q, d, logits]
    found = torch.autograd.grad(maxsim(q, d, q_weights=weights).square().sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad(terms.sum(-1).square().sum(), leaves)
    close = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    for given, right in zip(found, expected, strict=True):
        torch.testing.assert_close(given, right, **close)  # float32 sums of some tens, in another order


# ---- rules ------------------------------------------------------------------------------------------------------------


POOLINGS = [TopMeanPooling(1), TopMeanPooling(2), SoftmaxPooling(0.5), LogSumExpPooling(0.5), AttentionPooling(0.5)]


@pytest.mark.parametrize("pooling", [None, *POOLINGS], ids=str)
def test_empty_sets_score_by_rule_without_gradient(backend, pooling):
    q, d = tokens(3, 4, 8).requires_grad_(), tokens(3, 5, 8, seed=1).requires_grad_()
    q_mask, d_mask = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    q_mask[1], d_mask[2] = False, False
    options = {} if pooling is None else {"pooling": pooling}
    scores = maxsim(q, d, q_mask, d_mask, **options)
    assert (scores[:, 2] == -torch.inf).all()
    assert (scores[1, :2] == 0).all()
    dq, dd = torch.autograd.grad(scores.sum(), (q, d))
    assert dq[1].count_nonzero() == 0
    assert dd[2].count_nonzero() == 0
    assert dq.isfinite().all()
    assert dd.isfinite().all()


def test_what_masked_tokens_hold_has_no_effect(backend):
    x, y = tokens(3, 4, 8), tokens(2, 5, 8, seed=1)
    x_mask, y_mask = torch.rand(3, 4) < 0.6, torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    results = []
    for filler in (0.0, torch.nan, torch.inf):
        leaves = [
            each.masked_fill(~mask.unsqueeze(-1), filler).requires_grad_() for each, mask in ((x, x_mask), (y, y_mask))
        ]
        scores = filip_similarity(*leaves, x_mask, y_mask)
        total = sum(each.masked_fill(each.isinf(), 0).sum() for each in scores)
        results.append([*scores, *torch.autograd.grad(total, leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_token_that_is_not_a_number_gives_a_score_that_is_not(backend):
    q, d = tokens(2, 3, 8), tokens(3, 4, 8, seed=1)
    d[1, 2, 5] = torch.nan
    scores = maxsim(q, d)
    assert scores[:, 1].isnan().all()
    assert scores[:, [0, 2]].isfinite().all()


def test_no_queries_no_documents_no_tokens(backend):
    d = tokens(3, 4, 8)
    assert maxsim(tokens(0, 2, 8), d).shape == (0, 3)
    assert maxsim(d, tokens(0, 2, 8)).shape == (3, 0)
    assert (maxsim(d, tokens(2, 0, 8)) == -torch.inf).all()
    assert (maxsim(tokens(2, 0, 8), d) == 0).all()
    assert (project_max(tokens(2, 0, 8), tokens(5, 8)) == -torch.inf).all()


# ---- the best of a corpus ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 4000])
def test_topk_is_the_sorted_scores_lowest_index_first(backend, budget):
    q, d = integer_tokens(3, 4, 8), integer_tokens(40, 5, 8, seed=1)
    mask = torch.rand(40, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[7] = False
    values, order = maxsim(q, d, None, mask).sort(dim=1, descending=True, stable=True)
    packed = {"corpus": d[mask], "cu_seqlens_d": F.pad(mask.sum(1).cumsum(0), (1, 0))}
    padded = {"corpus": d, "d_mask": mask}
    blocks = {"corpus": [(d[:15], mask[:15]), (d[15:15], None), (d[15:], mask[15:])]}
    for corpus in (packed, padded, blocks):
        found = maxsim_topk(q, k=6, memory_budget=budget, **corpus)
        assert torch.equal(found.indices, order[:, :6])
        assert torch.equal(found.scores, values[:, :6])


def test_topk_of_fewer_documents_than_asked_for():
    q, d, mask = tokens(2, 3, 8), tokens(4, 5, 8, seed=1), torch.ones(4, 5, dtype=torch.bool)
    mask[1] = False
    found = maxsim_topk(q, d, 6, d_mask=mask)
    assert (found.indices[:, 3:] == -1).all()
    assert (found.scores[:, 3:] == -torch.inf).all()
    assert 1 not in found.indices
    with pytest.raises(ValueError, match=r"k=0: expected a whole number"):
        maxsim_topk(q, d, 0)
    with pytest.raises(ValueError, match="no padding to mask"):
        maxsim_topk(q, d.flatten(0, 1), 2, d_mask=mask, cu_seqlens_d=torch.tensor([0, 20]))


# ---- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, d: maxsim(q[0], d), ValueError, r"q has shape \[3, 8\]: expected \[sets, tokens, features\]"),
        (lambda q, d: maxsim(q, d[0]), ValueError, r"d is .* expected \[Nd, Ld, D\]"),
        (lambda q, d: maxsim(q.long(), d), TypeError, "q is torch.int64: expected a float16"),
        (lambda q, d: maxsim(q, d[..., :7]), ValueError, "q has 8 features, d 7"),
        (
            lambda q, d: maxsim(q, d, torch.ones(2, 3)),
            ValueError,
            r"mask of q .* expected a bool tensor of shape \[2, 3\]",
        ),
        (lambda q, d: maxsim(q, d, aggregate="max"), ValueError, "aggregate='max': expected"),
        (lambda q, d: maxsim(q, d, pooling="max"), TypeError, "pooling='max': expected MaxPooling"),
        (lambda q, d: maxsim(q, d[None, None, 0]), ValueError, "candidates for 1 queries, but there are 2"),
        (lambda q, d: maxsim_pairs(q, d), ValueError, "as many documents as queries"),
        (
            lambda q, d: maxsim_varlen(q[0], torch.tensor([0, 2]), d[0], torch.tensor([0, 4])),
            ValueError,
            "from 0 to 2: expected ascending boundaries from 0 to 3",
        ),
        (
            lambda q, d: maxsim(q, d, q_weights=q[..., 0], pooling=SoftmaxPooling(1.0)),
            ValueError,
            "q_weights with SoftmaxPooling",
        ),
        (lambda q, d: project_max(q, d[0, :, :7]), ValueError, r"expected \[columns, 8\]"),
        (lambda q, d: SoftmaxPooling(0.0), ValueError, "expected a finite number above 0"),
        (lambda q, d: TopMeanPooling(0), ValueError, "expected a whole number of at least 1"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call(tokens(2, 3, 8), tokens(3, 4, 8, seed=1))


def test_gradients_are_taken_once(backend):
    if backend == "reference":
        pytest.skip("plain autograd may be differentiated as often as one likes")
    q, d = tokens(2, 3, 8).requires_grad_(), tokens(3, 4, 8, seed=1).requires_grad_()
    for scores in (maxsim(q, d), project_max(d, q[0])):
        (gradient,) = torch.autograd.grad(scores.sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice on the"):
            gradient.sum().backward()


# ---- inside other machinery ---------------------------------------------------------------------------------------------


def objective(q: Tensor, d: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    of_q, of_d = filip_similarity(q, d, None, mask)
    soft = maxsim(q, d, None, mask, pooling=SoftmaxPooling(0.5))
    best = project_max(d, weight, None, mask)
    return (of_q.square() + of_d + soft).sum() + best.relu().log1p().sum()


@pytest.fixture
def operands() -> list[Tensor]:
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return [
        tokens(3, 4, 8).requires_grad_(),
        tokens(4, 5, 8, seed=1).requires_grad_(),
        mask,
        tokens(6, 8, seed=2).requires_grad_(),
    ]


def gradients(function, operands: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(function(*operands), [each for each in operands if each.requires_grad]))


def test_compiled_without_a_graph_break(backend, operands):
    if backend == "triton":
        pytest.skip("the interpreter cannot be traced")
    compiled = torch.compile(objective, fullgraph=True)
    for given, right in zip(gradients(compiled, operands), gradients(objective, operands), strict=True):
        torch.testing.assert_close(given, right)


def test_checkpointed_and_under_autocast(backend, operands):
    expected = gradients(objective, operands)

    def checkpointed(*given: Tensor) -> Tensor:
        return checkpoint(objective, *given, use_reentrant=False)

    for given, right in zip(gradients(checkpointed, operands), expected, strict=True):
        assert torch.equal(given, right)

    def autocast(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return objective(*given)

    for given, right in zip(gradients(autocast, operands), expected, strict=True):
        torch.testing.assert_close(given, right)


def test_an_explicit_backend_wins_over_the_device(operands):
    with use_backend("torch"):
        assert "OverPairs" in maxsim(*operands[:2]).grad_fn.name()
