"""Relatives of MaxSim against the papers' formulas, pair by pair in float64: values, gradients, masks, empty sets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import late_relatives as reference
from late_sets import differentiated, sets
from pairtile.kernels import (
    AttentionPooling,
    ClipLoss,
    Context,
    LogSumExpPooling,
    SigLipLoss,
    SoftmaxPooling,
    TokenReduction,
    bipartite_similarity,
    conditioned_similarity,
    finite_tokens,
    ipot_distance,
    maxsim,
    maxsim_varlen,
    mug_similarity,
    over_scores,
    region_max,
    sinkhorn_similarity,
    soft_dtw,
    span_means,
    top_tokens,
    use_backend,
)

BIN = torch.tensor(0.1, dtype=torch.float64)


def plain(function: Callable[..., Tensor], **options) -> Callable[..., Tensor]:
    return lambda x, y, x_mask, y_mask, **more: function(x, y, x_mask, y_mask, **options, **more)


#: name: (ours, the paper's of one pair, what an empty x and an empty y give)
RELATIVES = {
    "cico": (
        plain(maxsim, pooling=SoftmaxPooling(0.07), aggregate="mean"),
        reference.soft_maximum,
        (0, -torch.inf),
    ),
    "norton_tokens": (
        plain(maxsim, pooling=LogSumExpPooling(0.1), aggregate="mean"),
        reference.log_sum_exp,
        (0, -torch.inf),
    ),
    "radzero": (plain(maxsim, pooling=AttentionPooling(0.1)), reference.attention_cosine, (0, -torch.inf)),
    "mug": (
        plain(mug_similarity, temperature=0.1),
        partial(reference.mug, temperature=0.1, form="full"),
        (0, -torch.inf),
    ),
    "mug_simple": (
        plain(mug_similarity, temperature=0.1, form="simple"),
        partial(reference.mug, temperature=0.1, form="simple"),
        (0, -torch.inf),
    ),
    "sinkhorn": (
        plain(sinkhorn_similarity, epsilon=0.2, iterations=7),
        partial(reference.sinkhorn, epsilon=0.2, iterations=7, dustbin=None, hold=True),
        (0, -torch.inf),
    ),
    "sinkhorn_dustbin": (
        plain(sinkhorn_similarity, epsilon=0.2, iterations=7, dustbin=BIN, through_plan=True),
        partial(reference.sinkhorn, epsilon=0.2, iterations=7, dustbin=BIN, hold=False),
        (0, -torch.inf),
    ),
    "ipot": (
        plain(ipot_distance, iterations=20),
        partial(reference.ipot, beta=0.5, iterations=20),
        (torch.inf, torch.inf),
    ),
    "soft_dtw": (plain(soft_dtw, gamma=0.2), partial(reference.soft_dtw, gamma=0.2), (torch.inf, torch.inf)),
    "bipartite": (plain(bipartite_similarity), reference.bipartite, (0, -torch.inf)),
}


def pair_by_pair(formula, x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, empty: tuple[float, float]) -> Tensor:
    rows = []
    for a, of_a in zip(x, x_mask):
        row = []
        for b, of_b in zip(y, y_mask):
            nothing = empty[1] if not of_b.any() else empty[0] if not of_a.any() else None
            row.append(formula(a[of_a], b[of_b]) if nothing is None else x.new_tensor(nothing))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", RELATIVES)
def test_all_pairs_are_those_of_the_paper(name, backend):
    ours, formula, empty = RELATIVES[name]
    (x, x_mask), (y, y_mask) = sets(0, 4, 5), sets(1, 5, 4)
    expected = differentiated(lambda x, y: pair_by_pair(formula, x, y, x_mask, y_mask, empty), x, y)
    with use_backend(backend):
        # A budget of one byte makes a block of every pair.
        for budget in (1, None):
            given = differentiated(lambda x, y, b=budget: ours(x, y, x_mask, y_mask, memory_budget=b), x, y)
            torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", RELATIVES)
def test_candidates_and_float32(name):
    ours, _, _ = RELATIVES[name]
    (x, x_mask), (y, y_mask) = sets(2, 4, 3), sets(3, 4, 2, 5)
    x, y = x.nan_to_num(), y.nan_to_num()
    with use_backend("torch"):
        truth = differentiated(lambda x, y: ours(x, y, x_mask, y_mask), x, y)
        all_pairs = ours(x, y.flatten(0, 1), x_mask, y_mask.flatten(0, 1)).view(4, 4, 2)
        given = differentiated(lambda x, y: ours(x, y, x_mask, y_mask), x.float(), y.float())
    torch.testing.assert_close(truth[0], all_pairs[range(4), range(4)], rtol=1e-11, atol=1e-12)
    assert all(each.dtype == torch.float32 for each in given)
    # Temperatures of 0.07 and more of scores below 1: rounding of 6e-8 grows to a few 1e-6.
    torch.testing.assert_close([each.double() for each in given], list(truth), rtol=1e-4, atol=1e-5)


def test_dustbin_gets_the_gradient_of_the_plan():
    (x, x_mask), (y, y_mask) = sets(0, 4, 5), sets(1, 5, 4)
    found = []
    for paper in (False, True):
        dustbin = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
        if paper:
            formula = partial(reference.sinkhorn, epsilon=0.3, iterations=5, dustbin=dustbin, hold=False)
            scores = pair_by_pair(formula, x, y, x_mask, y_mask, (0, -torch.inf))
        else:
            options = {"epsilon": 0.3, "iterations": 5, "dustbin": dustbin, "through_plan": True}
            scores = sinkhorn_similarity(x, y, x_mask, y_mask, **options)
        scores[scores.isfinite()].sum().backward()
        found.append(dustbin.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_weighted_interaction():
    (x, x_mask), (y, y_mask) = sets(0, 4, 5), sets(1, 5, 4)
    generator = torch.Generator().manual_seed(5)
    logits = [torch.randn(mask.shape, generator=generator, dtype=torch.float64) for mask in (x_mask, y_mask)]

    def weights(given: Tensor, mask: Tensor) -> Tensor:
        return given.masked_fill(~(mask | ~mask.any(1, keepdim=True)), -torch.inf).softmax(1)

    def ours(x, y, of_x, of_y):
        forth = maxsim(x, y, x_mask, y_mask, q_weights=weights(of_x, x_mask))
        return (forth + maxsim(y, x, y_mask, x_mask, q_weights=weights(of_y, y_mask)).T) / 2

    def paper(x, y, of_x, of_y):
        rows = [
            [
                reference.weighted_interaction(a[i], b[j], of_x[k][i].softmax(0), of_y[m][j].softmax(0))
                if i.any() and j.any()
                else x.new_tensor(-torch.inf)
                for m, (b, j) in enumerate(zip(y, y_mask))
            ]
            for k, (a, i) in enumerate(zip(x, x_mask))
        ]
        return torch.stack([torch.stack(row) for row in rows])

    found = [differentiated(function, x, y, *logits) for function in (ours, paper)]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_text_conditioned_pooling_of_two_modalities(backend):
    (frames, frame_mask), (sounds, sound_mask) = sets(0, 5, 4, width=7), sets(1, 5, 3, width=7)
    frames, sounds = frames.nan_to_num(), sounds.nan_to_num()
    sound_mask[3] = False  # silent, but seen
    generator = torch.Generator().manual_seed(3)
    texts, to_query, to_keys, to_values = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 6), (2, 6), (2, 7), (6, 7))
    )

    def ours(texts, frames, sounds, *weights):
        q, k, v = weights
        contexts = [
            Context(each @ k.T, each @ v.T, mask) for each, mask in ((frames, frame_mask), (sounds, sound_mask))
        ]
        return conditioned_similarity(texts, texts @ q.T, *contexts, memory_budget=500)

    def paper(texts, frames, sounds, *weights):
        q, k, v = weights
        rows = []
        for text in texts:
            row = []
            for j in range(5):
                tokens = [each[j][mask[j]] for each, mask in ((frames, frame_mask), (sounds, sound_mask))]
                given = [(each @ k.T, each @ v.T) for each in tokens if len(each)]
                row.append(
                    reference.conditioned(text, q @ text, given, 2**0.5) if given else text.new_tensor(-torch.inf)
                )
            rows.append(torch.stack(row))
        return torch.stack(rows)

    inputs = texts, frames, sounds, to_query, to_keys, to_values
    with use_backend(backend):
        given = differentiated(ours, *inputs)
    torch.testing.assert_close(given, differentiated(paper, *inputs), rtol=1e-10, atol=1e-11)


def test_one_vector_against_several():
    """ViLLA's regions, packed and padded; an image without any."""
    (regions, mask), (texts, _) = sets(0, 4, 5), sets(1, 6, 3)
    texts, cu = texts[0].nan_to_num(), F.pad(mask.sum(1).cumsum(0), (1, 0))
    padded = differentiated(lambda x, y: region_max(x, y, mask=mask), texts, regions)
    packed = differentiated(lambda x, y: region_max(x, y, cu), texts, regions[mask])
    expected = torch.stack(
        [
            (texts @ each[of].T).max(1).values if of.any() else texts.new_full((3,), -torch.inf)
            for each, of in zip(regions, mask)
        ],
        1,
    )
    torch.testing.assert_close(padded[0], expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(packed, (padded[0], padded[1], padded[2][mask]), rtol=1e-12, atol=1e-14)


def test_concepts_are_means_of_their_words():
    generator = torch.Generator().manual_seed(0)
    words, patches = (torch.randn(3, k, 6, generator=generator, dtype=torch.float64) for k in (5, 4))
    owners, starts, ends = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 4, 1]), torch.tensor([3, 5, 5, 3])
    cu = torch.tensor([0, 2, 3, 4])

    def ours(words, patches):
        concepts = span_means(words, owners, starts, ends)
        scores = maxsim_varlen(concepts, cu, patches.flatten(0, 1), torch.tensor([0, 4, 8, 12]), aggregate="mean")
        return over_scores(SigLipLoss(), scores, None, 2.0, logit_bias=-1.0)

    def paper(words, patches):
        concepts = [words[o, s:e].mean(0) for o, s, e in zip(owners, starts, ends)]
        best = torch.stack([(patches @ each).max(1).values for each in concepts])
        scores = torch.stack([best[i:j].mean(0) for i, j in itertools.pairwise(cu)])
        sign = 2 * torch.eye(3, dtype=torch.float64) - 1
        return F.softplus(-sign * (2 * scores - 1), threshold=100).sum() / 3

    torch.testing.assert_close(
        differentiated(ours, words, patches), differentiated(paper, words, patches), rtol=1e-10, atol=1e-12
    )
    with pytest.raises(ValueError, match="span 0 has the tokens 4 to 5 of text 0"):
        span_means(words, owners[:1], starts[:1] + 4, ends[:1] + 3)


@pytest.mark.parametrize(
    "function",
    [bipartite_similarity, partial(sinkhorn_similarity, iterations=3, dustbin=BIN.float(), through_plan=True)],
    ids=["without_numbers", "with_a_shared_tensor"],
)
def test_a_formula_inside_torch_compile(function):
    (x, mask), (y, _) = sets(0, 4, 5), sets(1, 4, 3)
    x, y = x.nan_to_num().float(), y.nan_to_num().float()
    results = []
    with use_backend("torch"):
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            scores = call(leaf, y, mask)
            scores.sum().backward()
            results.append((scores.detach(), leaf.grad))
    assert all(map(torch.equal, *results))


def test_soft_alignments_train_like_any_score():
    (x, _), (y, _) = sets(0, 4, 5), sets(1, 4, 3)
    x, y = x.nan_to_num().requires_grad_(), y.nan_to_num()
    loss = over_scores(ClipLoss(), -soft_dtw(x, y), None, 5.0)
    loss.backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: mug_similarity(x, x, form="whole"), "form='whole'"),
        (lambda x: mug_similarity(x, x, temperature=0), "temperature=0"),
        (lambda x: sinkhorn_similarity(x, x, iterations=0), "iterations=0"),
        (lambda x: sinkhorn_similarity(x, x, dustbin=torch.ones(2)), r"dustbin has shape \[2\]"),
        (lambda x: ipot_distance(x, x[:2, None]), "candidates"),
        (lambda x: soft_dtw(x, x[0]), r"y is .*\[4, 5\]"),
        (lambda x: soft_dtw(x, x, torch.ones(3, 4)), "mask of x"),
        (lambda x: conditioned_similarity(x[:, 0], x[:, 0]), "no context"),
        (lambda x: conditioned_similarity(x[:, 0], x[:, 0], Context(x, x[:, :2])), r"values of context 0"),
        (lambda x: finite_tokens(x, x[0], weights="max"), "weights='max'"),
        (lambda x: TokenReduction(6, 2, groups=4), "groups that divide"),
        (lambda x: top_tokens(x, x[:, 0], 9), "k=9"),
        (lambda x: region_max(x, x), "x is a"),
    ],
)
def test_errors_say_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 4, 5))
