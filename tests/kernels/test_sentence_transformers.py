"""sentence-transformers' ranking losses served by ours: value and gradients against its own, and what is left as it was."""

from __future__ import annotations

import ast
import copy
import pickle
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from pairtile import kernels
from pairtile.kernels import use_backend
from pairtile.kernels.build import warn_once
from pairtile.kernels.integrations import sentence_transformers as pairtile_st

sentence_transformers = pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.losses import multiple_negatives_ranking as theirs  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

PAIRS = losses.MultipleNegativesRankingLoss
CACHED = losses.CachedMultipleNegativesRankingLoss
METHODS = [(PAIRS, "compute_loss_from_embeddings"), (CACHED, "calculate_loss")]

ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
OPTIONS = [
    {"similarity_fct": sentence_transformers.util.dot_score, "scale": 3.0},
    {"directions": ("query_to_doc", "doc_to_query")},
    {"directions": ("query_to_doc", "query_to_query")},
    {"directions": ("query_to_doc", "doc_to_doc"), "hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    {"directions": ALL_DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 9.0},
    SYMMETRIC,
    SYMMETRIC | {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    {},
    {"directions": ALL_DIRECTIONS, "hardness_mode": "in_batch_negatives", "hardness_strength": 0.0},
]


@pytest.fixture(autouse=True)
def _as_found():
    yield
    pairtile_st.disable()
    assert not any("pairtile" in vars(owner)[name].__code__.co_filename for owner, name in METHODS)


@pytest.fixture
def served(monkeypatch):
    """How many losses our operators have computed."""
    calls = []
    ours = pairtile_st.multiple_negatives_ranking
    monkeypatch.setattr(
        pairtile_st, "multiple_negatives_ranking", lambda *args, **kwargs: calls.append(1) or ours(*args, **kwargs)
    )
    return calls


def columns(negatives, batch=11, width=8):
    """Embeddings of queries, of their positives, and of their hard negatives; not normalised, rounded to float32."""
    generator = torch.Generator().manual_seed(negatives)
    made = [torch.randn(batch, width, generator=generator) for _ in range(2 + negatives)]
    return [made[0], made[0] + made[1], *made[2:]]


def value_and_gradients(loss, embeddings, dtype):
    leaves = [each.to(dtype, copy=True).requires_grad_() for each in embeddings]
    value = loss.compute_loss_from_embeddings(leaves, None)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_every_option_gives_their_value_and_gradients(backend, dtype, some, served, relative_error, negatives):
    # Their log-sum-exp minus the pair's score cancels, in float64 by a few 1e-15 on such pairs. A float32 logit of
    # size 30 is rounded by 1e-6.
    bound = 1e-12 if dtype == torch.float64 else 5e-6
    for options in some(OPTIONS):
        loss = PAIRS(nn.Identity(), **options)
        truth = value_and_gradients(loss, columns(negatives), torch.float64)
        given = value_and_gradients(pairtile_st.accelerate(loss), columns(negatives), dtype)
        for result, expected in zip(given, truth, strict=True):
            assert result.dtype == dtype
            assert relative_error(result, expected) < bound, options
    assert len(served) == len(some(OPTIONS))


def test_embeddings_of_16_bits_are_compared_in_32(relative_error):
    half, loss = [each.bfloat16() for each in columns(1)], PAIRS(nn.Identity())
    truth = value_and_gradients(loss, half, torch.float64)
    given = value_and_gradients(pairtile_st.accelerate(loss), half, torch.bfloat16)
    assert given[0].dtype == torch.float32
    assert relative_error(given[0], truth[0]) < 5e-6
    for gradient, expected in zip(given[1:], truth[1:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient, expected) < 2**-8  # its own rounding


@pytest.mark.parametrize("options", [SYMMETRIC, OPTIONS[4], OPTIONS[6]])
def test_gathered_embeddings_of_other_ranks(monkeypatch, served, relative_error, options):
    """Rank 1 of 3, as their gather would give it; gradients go to all that was gathered."""
    results = []
    for accelerate in (False, True):
        everyone = [each.double().requires_grad_() for each in columns(2, batch=12)]
        own = [each[4:8] for each in everyone]

        def gather(shard, own=own, everyone=everyone):
            at = [shard is each for each in own].index(True)
            return everyone[at]

        loss = PAIRS(nn.Identity(), gather_across_devices=True, similarity_fct=DOT, **options)
        if accelerate:
            monkeypatch.setattr(sentence_transformers.util, "all_gather_with_grad", gather)
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
            pairtile_st.accelerate(loss)
        else:
            monkeypatch.setattr(theirs, "all_gather_with_grad", gather)
            monkeypatch.setattr(theirs, "get_rank", lambda: 1)
        value = loss.compute_loss_from_embeddings(own, None)
        results.append([value, *torch.autograd.grad(value, everyone)])
    assert served
    for expected, given in zip(*results, strict=True):
        assert relative_error(given, expected) < 1e-12


DOT = sentence_transformers.util.dot_score
WORDS = [f"w{k}" for k in range(40)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of two layers, with dropout, and a tokenizer of forty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    BertModel(BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(folder)
    return sentence_transformers.SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16)], device="cpu")


@pytest.fixture
def features(encoder):
    """Tokens of texts of mixed lengths, one dictionary for each column."""

    def make(number, batch=10):
        words = random.Random(number)
        texts = [[" ".join(words.choices(WORDS, k=words.randint(1, 9))) for _ in range(batch)] for _ in range(number)]
        return [dict(encoder.preprocess(column)) for column in texts]

    return make


def training_step(loss, features):
    """The loss, and the gradient of every parameter, dropout drawn from one seed."""
    model = loss.model.train()
    model.zero_grad()
    torch.manual_seed(3)
    value = loss([dict(each) for each in features], None)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same_step(given, expected, relative_error):
    assert len(given) == len(expected) > 30
    for result, truth in zip(given, expected, strict=True):
        # The gradient of a key's bias is 0 but for rounding.
        assert relative_error(result, truth, size=1e-2) < 2e-5


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize(
    "make",
    [
        PAIRS,
        lambda model: CACHED(model, mini_batch_size=4),
        lambda model: losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=3),
        lambda model: losses.MatryoshkaLoss(model, PAIRS(model), [16, 8]),
        lambda model: losses.MatryoshkaLoss(model, CACHED(model, mini_batch_size=4), [16, 8], [1.0, 0.5]),
    ],
    ids=["pairs", "cached", "cached symmetric", "Matryoshka", "Matryoshka of cached"],
)
def test_training_steps_are_theirs(encoder, features, served, relative_error, make, columns):
    batch = features(columns)
    expected = training_step(make(encoder), batch)
    assert not served
    loss = make(encoder)
    assert pairtile_st.accelerate(loss) is loss
    assert_same_step(training_step(loss, batch), expected, relative_error)
    calls = len(served)
    assert calls
    pairtile_st.restore(loss)
    assert_same_step(training_step(loss, batch), expected, relative_error)
    with pairtile_st.enabled():
        enabled = make(encoder)
        assert_same_step(training_step(enabled, batch), expected, relative_error)
    assert len(served) == 2 * calls
    training_step(enabled, batch)
    assert len(served) == 2 * calls


def test_evaluation_without_gradients(encoder, features, served):
    loss = CACHED(encoder.eval(), mini_batch_size=3)
    with torch.no_grad():
        expected = loss(features(3), None)
        given = pairtile_st.accelerate(loss)(features(3), None)
    assert served
    assert not given.requires_grad
    torch.testing.assert_close(given, expected)


def test_switching_on_and_off(served):
    def count(loss):
        del served[:]
        loss.compute_loss_from_embeddings(columns(0), None)
        return len(served)

    loss, found = PAIRS(nn.Identity()), [vars(owner)[name] for owner, name in METHODS]
    for _ in range(2):
        pairtile_st.enable()
    assert count(loss) == 1
    with pairtile_st.enabled(), pairtile_st.enabled():
        pairtile_st.disable()
        assert count(loss) == 1
    assert count(loss) == 0
    assert [vars(owner)[name] for owner, name in METHODS] == found
    pairtile_st.enable()
    with pytest.raises(KeyError), pairtile_st.enabled():
        raise KeyError
    assert count(loss) == 1
    pairtile_st.disable()
    pairtile_st.disable()
    assert count(pairtile_st.restore(loss)) == 0
    assert count(pairtile_st.accelerate(pairtile_st.accelerate(loss))) == 1
    assert count(pairtile_st.restore(loss)) == 0


def test_what_else_a_loss_has_stays(served):
    plain, loss = CACHED(nn.ModuleList([nn.Identity()])), CACHED(nn.ModuleList([nn.Identity()]))
    pairtile_st.accelerate(loss)
    assert type(loss) is CACHED
    assert loss.get_config_dict() == plain.get_config_dict()
    assert loss.citation == plain.citation
    assert loss.state_dict() == plain.state_dict()
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        again.scale = 1.0
        assert loss.scale == 20.0
        del served[:]
        reps = [[each] for each in columns(1)]
        expected = PAIRS(nn.Identity(), scale=1.0).compute_loss_from_embeddings(columns(1), None)
        torch.testing.assert_close(again.calculate_loss(reps), expected)
        assert served


def test_a_learnable_scale_gets_its_gradient():
    gradients = []
    for prepare in (nn.Module.train, pairtile_st.accelerate):
        loss = prepare(PAIRS(nn.Identity()))
        loss.scale = nn.Parameter(torch.tensor(20.0))
        loss.compute_loss_from_embeddings(columns(1), None).backward()
        gradients.append(loss.scale.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: PAIRS(nn.Identity(), similarity_fct=sentence_transformers.util.euclidean_sim), "euclidean_sim"),
        (
            lambda: PAIRS(nn.Identity(), torch.tensor(20.0), hardness_mode="all_negatives", hardness_strength=1.0),
            "scale",
        ),
    ],
)
def test_what_cannot_be_served_is_theirs_after_one_warning(served, make, reason):
    warn_once.cache_clear()
    expected = make().compute_loss_from_embeddings(columns(1), None)
    loss = pairtile_st.accelerate(make())
    with pytest.warns(RuntimeWarning, match=reason):
        given = loss.compute_loss_from_embeddings(columns(1), None)
    with warnings.catch_warnings(action="error"):
        loss.compute_loss_from_embeddings(columns(1), None)
    assert torch.equal(given, expected)
    assert not served


def test_sparse_embeddings_are_theirs(served):
    loss = pairtile_st.accelerate(PAIRS(nn.Identity(), similarity_fct=DOT))
    with pytest.warns(RuntimeWarning, match="sparse"), pytest.raises(NotImplementedError):  # torch cannot index them
        loss.compute_loss_from_embeddings([each.to_sparse() for each in columns(0)], None)
    assert not served


def test_losses_that_compute_otherwise_are_refused():
    class Own(PAIRS):
        def compute_loss_from_embeddings(self, embeddings, labels):
            return super().compute_loss_from_embeddings(embeddings, labels) + 1

    for other in (Own(nn.Identity()), nn.CrossEntropyLoss(), "MultipleNegativesRankingLoss"):
        with pytest.raises(TypeError, match="expected MultipleNegativesRankingLoss or Cached"):
            pairtile_st.accelerate(other)
    with pytest.raises(ValueError, match="at least 2"):
        pairtile_st.accelerate(PAIRS(nn.Identity())).compute_loss_from_embeddings(columns(0)[:1], None)


def test_the_package_is_imported_by_calls_alone(monkeypatch):
    for file in Path(kernels.__file__).parent.rglob("*.py"):
        imported = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        absolute = [ast.unparse(node) for node in imported if not getattr(node, "level", 0)]
        assert not [each for each in absolute if "sentence_transformers" in each], file
    pairtile_st._methods.cache_clear()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    pairtile_st.disable()
    for call in (pairtile_st.enable, lambda: pairtile_st.accelerate(nn.Identity())):
        with pytest.raises(ImportError, match="pip install sentence-transformers"):
            call()
    assert not pairtile_st._switch.on


def test_their_trainer_trains(encoder, served, tmp_path):
    """Needs sentence-transformers[train]."""
    pytest.importorskip("accelerate")
    datasets = pytest.importorskip("datasets")
    texts = {name: [f"w{k} w{k + shift}" for k in range(8)] for shift, name in enumerate(("anchor", "positive"), 1)}
    settings = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, report_to="none", use_cpu=True, save_strategy="no"
    )
    model = copy.deepcopy(encoder)
    loss = CACHED(model, mini_batch_size=4)
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model, settings, datasets.Dataset.from_dict(texts), loss=loss
    )
    with pairtile_st.enabled(), use_backend("torch"):
        trainer.train()
    assert len(served) == 2
    before, after = encoder.state_dict(), model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
