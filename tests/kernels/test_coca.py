"""`CoCaLoss` against open_clip's class, from logits and from hidden states."""

from __future__ import annotations

import inspect

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from against_float64 import assert_as_exact
from pairtile.kernels import ClipLoss, CoCaLoss

BATCH, LENGTH, VOCABULARY, WIDTH = 9, 5, 37, 12


@pytest.fixture
def captions(embeddings):
    """Image and text features, hidden states, vocabulary (float64), and labels of which some are padding."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    vocabulary = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator)
    for row in range(BATCH):
        labels[row, LENGTH - row % LENGTH :] = 0
    return (*embeddings(BATCH, BATCH, 8), hidden, vocabulary), labels


@pytest.mark.parametrize("from_hidden", [True, False])
@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.0), (0.0, 3.0)])
def test_equals_open_clips_class(backend, captions, weights, from_hidden):
    features, labels = captions
    theirs = open_clip.loss.CoCaLoss(*weights)

    def ours(x, y, hidden, vocabulary, scale):
        loss = CoCaLoss(*weights)
        if from_hidden:
            return sum(loss(x, y, None, labels, scale, hidden_states=hidden, vocab_weight=vocabulary))
        return sum(loss(x, y, hidden @ vocabulary.T, labels, scale))

    def dense(logits, x, y, hidden, vocabulary):
        caption_logits = (hidden.flatten(0, 1) @ vocabulary.T).view(BATCH, LENGTH, VOCABULARY)
        return sum(theirs(x, y, caption_logits, labels, logits.scale))

    assert_as_exact(ours, dense, features, 20.0)


def test_returns_what_open_clips_class_returns(backend, dtype, captions):
    (x, y, hidden, vocabulary), labels = [each.to(dtype) for each in captions[0]], captions[1]
    logits = hidden @ vocabulary.T
    for ours, theirs in (
        (CoCaLoss(2.0, 1.0), open_clip.loss.CoCaLoss(2.0, 1.0)),
        (CoCaLoss(1, 0), open_clip.loss.CoCaLoss(1, 0)),
    ):
        given, expected = (loss(x, y, logits, labels, 5.0) for loss in (ours, theirs))
        assert isinstance(given, tuple)
        torch.testing.assert_close(given, expected)
        given, expected = (loss(x, y, logits, labels, 5.0, output_dict=True) for loss in (ours, theirs))
        assert list(given) == list(expected)
        torch.testing.assert_close(given, expected)
    assert isinstance(CoCaLoss(1, 1), ClipLoss)


def test_another_padding_and_the_options_of_the_contrast(backend, dtype, captions):
    (x, y, hidden, vocabulary), labels = [each.to(dtype) for each in captions[0]], captions[1]
    options = {"label_smoothing": 0.1, "direction_weights": (1.0, 0.5)}
    contrast, caption = CoCaLoss(1, 1, pad_id=3, **options)(
        x, y, None, labels, 5.0, hidden_states=hidden, vocab_weight=vocabulary
    )
    torch.testing.assert_close(contrast, ClipLoss(**options)(x, y, 5.0))
    logits = (hidden @ vocabulary.T).permute(0, 2, 1)
    torch.testing.assert_close(caption, F.cross_entropy(logits, labels, ignore_index=3))


@pytest.mark.parametrize("from_hidden", [True, False])
def test_reductions_agree(backend, dtype, captions, from_hidden):
    (x, y, hidden, vocabulary), labels = [each.to(dtype) for each in captions[0]], captions[1]
    what = {"hidden_states": hidden, "vocab_weight": vocabulary} if from_hidden else {}
    logits = None if from_hidden else hidden @ vocabulary.T
    pairs, tokens = CoCaLoss(2, 1, reduction="none")(x, y, logits, labels, 5.0, **what)
    assert (pairs.shape, tokens.shape) == ((BATCH,), (BATCH, LENGTH))
    assert not tokens[labels == 0].any()
    given = CoCaLoss(2, 1, reduction="sum")(x, y, logits, labels, 5.0, **what)
    torch.testing.assert_close(given, (pairs.sum(), tokens.sum()))
    given = CoCaLoss(2, 1)(x, y, logits, labels, 5.0, **what)
    torch.testing.assert_close(given, (pairs.mean(), tokens[labels != 0].mean()))


@pytest.mark.parametrize("from_hidden", [True, False])
def test_a_batch_of_padding_has_no_caption_loss(backend, dtype, captions, from_hidden):
    (x, y, hidden, vocabulary), labels = [each.to(dtype) for each in captions[0]], captions[1]
    hidden.requires_grad_()
    what = {"hidden_states": hidden, "vocab_weight": vocabulary} if from_hidden else {}
    logits = None if from_hidden else hidden @ vocabulary.T
    _, caption = CoCaLoss(1, 1)(x, y, logits, torch.zeros_like(labels), 5.0, **what)
    assert caption.isnan()
    assert not torch.autograd.grad(caption, hidden)[0].any()


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_are_open_clips(method):
    ours, theirs = (inspect.signature(getattr(cls, method)).parameters for cls in (CoCaLoss, open_clip.loss.CoCaLoss))
    positional = {key: p.default for key, p in ours.items() if p.kind is not p.KEYWORD_ONLY}
    assert list(positional.items()) == [(key, p.default) for key, p in theirs.items()]


def test_arguments_that_do_not_fit_are_refused(captions):
    (x, y, hidden, vocabulary), labels = captions
    loss = CoCaLoss(1, 1)
    for logits, what in ((None, {}), (None, {"hidden_states": hidden}), (hidden, {"vocab_weight": vocabulary})):
        with pytest.raises(ValueError, match="either logits, or both hidden_states and vocab_weight"):
            loss(x, y, logits, labels, 1.0, **what)
    with pytest.raises(ValueError, match=r"logits \[9, 5, 12\] and labels \[9, 4\] do not fit"):
        loss(x, y, hidden, labels[:, 1:], 1.0)
    with pytest.raises(ValueError, match=r"text_features \[8, 8\] differ"):
        loss(x, y[1:], hidden, labels, 1.0)
