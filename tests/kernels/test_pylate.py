"""PyLate's scores, losses and reranking served by ours, against its own on a small random ColBERT. `make peers` runs it."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
import torch.nn.functional as F

from pairtile.kernels.build import warn_once
from pairtile.kernels.integrations import pylate as pairtile_pylate

pytest.importorskip("pylate", reason="PyLate's pins ask for an environment of its own: make peers")

from pylate import losses, models, rank
from pylate.scores import colbert_kd_scores, colbert_scores, colbert_scores_pairwise

WORDS = [f"w{k}" for k in range(40)]


@pytest.fixture
def served(monkeypatch):
    """The calls that our operators have answered."""
    calls = []
    for name in ("maxsim", "token_scores"):
        ours = getattr(pairtile_pylate, name)
        monkeypatch.setattr(
            pairtile_pylate, name, lambda *args, ours=ours, **kwargs: calls.append(1) or ours(*args, **kwargs)
        )
    return calls


@pytest.fixture(scope="module", params=[True, False], ids=["expanded queries", "masked queries"])
def colbert(request, tmp_path_factory):
    """A ColBERT over a BERT of two layers with dropout, from a config, and a tokenizer of forty words."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    vocabulary = {word: k for k, word in enumerate([*special.values(), ".", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {
        "vocab_size": len(vocabulary) + 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(folder)
    lengths = {"query_length": 6, "document_length": 12}
    return models.ColBERT(str(folder), device="cpu", embedding_size=8, do_query_expansion=request.param, **lengths)


def texts(number, seed):
    """Of mixed lengths, some with a full stop, which PyLate's skip list masks."""
    words = random.Random(seed)
    return [" ".join(words.choices([*WORDS, "."], k=words.randint(1, 9))) for _ in range(number)]


def step(make, model, features, labels):
    """The loss, and the gradient of every parameter, dropout drawn from one seed."""
    loss = make(model.train())
    model.zero_grad()
    torch.manual_seed(3)
    value = loss([dict(each) for each in features], labels)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "make",
    [
        losses.Contrastive,
        lambda model: losses.CachedContrastive(model, mini_batch_size=2, temperature=0.5),
        losses.Distillation,
    ],
    ids=["Contrastive", "CachedContrastive", "Distillation"],
)
def test_a_training_step_is_theirs(colbert, served, relative_error, make):
    queries = colbert.tokenize(texts(5, 0), is_query=True)
    if make is losses.Distillation:
        features = [queries, colbert.tokenize(texts(20, 1), is_query=False)]
        labels = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    else:
        # documents of one length, as PyLate stacks positives and negatives
        features = [queries, *(colbert.tokenize(texts(5, 1 + k), is_query=False, pad=True) for k in range(3))]
        labels = None
    expected = step(make, colbert, features, labels)
    assert not served
    with pairtile_pylate.enabled():
        given = step(make, colbert, features, labels)
    assert served
    assert len(given) == len(expected) > 30
    for result, truth in zip(given, expected, strict=True):
        # The gradient of a key's bias is 0 but for rounding.
        assert relative_error(result, truth, size=1e-2) < 1e-5


def test_reranking_is_theirs(colbert, served):
    colbert.eval()
    queries = colbert.encode(texts(2, 0), is_query=True, show_progress_bar=False)
    documents = [colbert.encode(texts(n, n), is_query=False, show_progress_bar=False) for n in (4, 7)]
    ids = [list("abcd"), list("efghijk")]
    expected = rank.rerank(ids, queries, documents)
    with pairtile_pylate.enabled():
        given = rank.rerank(ids, queries, documents)
    assert len(served) == 2
    assert [[each["id"] for each in one] for one in given] == [[each["id"] for each in one] for one in expected]
    for one, other in zip(given, expected, strict=True):
        assert [each["score"] for each in one] == pytest.approx([each["score"] for each in other], rel=1e-5)


def random_tokens(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def masks():
    """Of 4 queries of 5 tokens and of 3 documents of 9, some of them fully masked; as numbers, as PyLate's example has them."""
    queries, documents = torch.ones(4, 5), torch.ones(3, 9)
    queries[1, 3:], queries[3] = 0, 0
    documents[0, ::2], documents[2] = 0, 0
    return queries, documents


def both_ways(score, *tokens, **options):
    """Scores and gradients of a random weighting, PyLate's own and ours."""
    results = []
    for way in (score, with_ours(score)):
        leaves = [each.clone().requires_grad_() for each in tokens]
        scores = way(*leaves, **options)
        weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(9))
        results.append([scores.detach(), *torch.autograd.grad((scores * weights).sum(), leaves)])
    return results


def with_ours(score):
    @pairtile_pylate.enabled()
    def served(*args, **kwargs):
        return score(*args, **kwargs)

    return served


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_masked_scores_are_theirs(served, masks, kind):
    """A masked token of a document scores 0, not -inf: PyLate's numbers."""
    options = dict(zip(("queries_mask", "documents_mask"), (each.to(kind) for each in masks), strict=True))
    queries, documents = random_tokens(4, 5, 8), random_tokens(3, 9, 8, seed=1)
    for theirs, ours in zip(*both_ways(colbert_scores, queries, documents, **options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    candidates = random_tokens(4, 3, 9, 8, seed=2)
    options["documents_mask"] = options["documents_mask"].expand(4, 3, 9)
    for theirs, ours in zip(*both_ways(colbert_kd_scores, queries, candidates, **options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(served) == 2


def test_pairs_are_theirs(served):
    """As two tensors, and as lists of documents of different lengths, as the evaluators give them."""
    queries, documents = random_tokens(4, 5, 8), random_tokens(4, 9, 8, seed=1)
    for theirs, ours in zip(*both_ways(colbert_scores_pairwise, queries, documents), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ragged = [each[: 3 + k] for k, each in enumerate(documents)]
    expected = colbert_scores_pairwise(queries, ragged)
    torch.testing.assert_close(with_ours(colbert_scores_pairwise)(queries, ragged), expected)
    assert len(served) == 2


def test_arrays_and_other_backends(served):
    queries, documents = random_tokens(4, 5, 8), random_tokens(3, 9, 8, seed=1)
    expected = colbert_scores(queries, documents)
    torch.testing.assert_close(with_ours(colbert_scores)(queries.numpy(), list(documents)), expected)
    assert len(served) == 1
    torch.testing.assert_close(with_ours(colbert_scores)(queries, documents, backend="torch"), expected)
    with pytest.raises(RuntimeError, match="requires CUDA or MPS"):
        with_ours(colbert_scores)(queries, documents, backend="lik")
    assert len(served) == 1


def test_what_cannot_be_served_is_theirs_after_one_warning(served):
    warn_once.cache_clear()
    queries, documents = torch.ones(2, 3, 4, dtype=torch.int64), torch.ones(2, 5, 4, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match=r"embeddings of torch\.int64"):
        given = with_ours(colbert_scores)(queries, documents)
    assert torch.equal(given, colbert_scores(queries, documents))
    with warnings.catch_warnings(action="error"):
        with_ours(colbert_scores)(queries, documents)
    assert not served


def test_switching_on_and_off(served):
    def count():
        del served[:]
        colbert_scores(random_tokens(1, 2, 4), random_tokens(1, 3, 4))
        return len(served)

    found = [getattr(each.owner, each.name) for each in pairtile_pylate._replacements()]
    pairtile_pylate.enable()
    assert count() == 1
    pairtile_pylate.disable()
    assert count() == 0
    assert [getattr(each.owner, each.name) for each in pairtile_pylate._replacements()] == found
