"""colpali-engine's scores and losses served by ours, against its own on random tensors. `make peers` runs it."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from pairtile.kernels.build import warn_once
from pairtile.kernels.integrations import colpali as pairtile_colpali

pytest.importorskip("colpali_engine", reason="colpali-engine's pins ask for an environment of its own: make peers")

from colpali_engine import loss as losses
from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor

IN_BATCH = [losses.ColbertLoss, losses.ColbertPairwiseCELoss, losses.ColbertSigmoidLoss]
NEGATIVES = [losses.ColbertNegativeCELoss, losses.ColbertPairwiseNegativeCELoss]


@pytest.fixture
def served(monkeypatch):
    """The calls that our operators have answered."""
    calls, ours = [], pairtile_colpali.maxsim
    monkeypatch.setattr(pairtile_colpali, "maxsim", lambda *args, **kwargs: calls.append(1) or ours(*args, **kwargs))
    return calls


def tokens(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def padded(embeddings):
    """The last two tokens of every other set times 0, as the models multiply by the attention mask."""
    mask = torch.ones(embeddings.shape[:-1])
    mask[1::2, ..., -2:] = 0
    return embeddings * mask.unsqueeze(-1)


@pytest.fixture
def embeddings():
    """Of 6 queries, their documents and 3 negatives for each."""
    queries, documents = tokens(6, 5, 8), tokens(6, 9, 8, seed=1)
    documents[:, :5] = F.normalize(documents[:, :5] + 2 * queries, dim=-1)  # some cosine with the query's own
    return [queries, documents, tokens(6, 3, 9, 8, seed=2)]


def step(loss, embeddings):
    leaves = [each.clone().requires_grad_() for each in embeddings]
    value = loss(*map(padded, leaves))
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_theirs(loss, embeddings):
    expected = step(loss, embeddings)
    with pairtile_colpali.enabled():
        given = step(loss, embeddings)
    for result, truth in zip(given, expected, strict=True):
        # Temperatures of 0.02 enlarge a rounding error of 1e-7 to 5e-6 of a probability.
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_smooth_max": True},
        {"normalize_scores": False, "temperature": 0.5, "pos_aware_negative_filtering": True},
        {"use_smooth_max": True, "normalize_scores": False, "temperature": 0.5},
    ],
    ids=["as it comes", "smooth", "filtered sums", "smooth sums"],
)
@pytest.mark.parametrize("kind", [*IN_BATCH, *NEGATIVES])
@pytest.mark.filterwarnings("ignore:colpali-engine's own scores serve:RuntimeWarning")
def test_losses_are_theirs(served, embeddings, kind, options):
    assert_theirs(kind(**options), embeddings if kind in NEGATIVES else embeddings[:2])
    # Beside explicit negatives their own smooth maximum serves; the term of the batch is ours in any case.
    expected = 1 + (kind in NEGATIVES and "use_smooth_max" not in options)
    assert len(served) == expected


def test_scores_of_lists_are_theirs(served):
    """Padded with zeros in batches, so that a shorter document has a token that scores 0: colpali-engine's numbers."""
    queries = [tokens(1, length, 8, seed=length)[0] for length in (3, 5, 4)]
    documents = [-tokens(1, length, 8, seed=length)[0].abs() for length in (9, 2, 7, 4, 6)]
    queries = [each.abs() for each in queries]  # all products below 0
    arguments = queries, documents, 2, "cpu"
    expected = BaseVisualRetrieverProcessor.score_multi_vector(*arguments)
    with pairtile_colpali.enabled():
        given = BaseVisualRetrieverProcessor.score_multi_vector(*arguments)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
    assert (given == 0).any()
    assert len(served) == 2 * 3


def test_their_own_backend_is_theirs(served, embeddings, monkeypatch):
    monkeypatch.setenv("COLPALI_SCORES_BACKEND", "torch")
    with warnings.catch_warnings(action="error", category=RuntimeWarning), pairtile_colpali.enabled():
        for options in ({}, {"use_smooth_max": True}):
            losses.ColbertNegativeCELoss(**options)(*embeddings)
    assert not served


def test_what_cannot_be_served_is_theirs_after_one_warning(served, embeddings):
    loss = losses.ColbertNegativeCELoss(use_smooth_max=True, in_batch_term_weight=0)
    expected = loss(*embeddings)
    warn_once.cache_clear()
    with pairtile_colpali.enabled():
        with pytest.warns(RuntimeWarning, match="smooth maximum over explicit negatives"):
            given = loss(*embeddings)
        with warnings.catch_warnings(action="error"):
            loss(*embeddings)
    assert torch.equal(given, expected)
    assert not served


def test_switching_on_and_off(served, embeddings):
    found = [getattr(each.owner, each.name) for each in pairtile_colpali._replacements()]
    pairtile_colpali.enable()
    losses.ColbertLoss()(*embeddings[:2])
    assert len(served) == 1
    pairtile_colpali.disable()
    losses.ColbertLoss()(*embeddings[:2])
    assert len(served) == 1
    assert [getattr(each.owner, each.name) for each in pairtile_colpali._replacements()] == found
