"""`ClipLoss` beyond open_clip's: label smoothing, weights of the directions, extra negatives."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from against_float64 import assert_as_exact
from pairtile.kernels import ClipLoss


def dense(logits, x, y, negative_texts, negative_images, *, smoothing=0.0, weights=(0.5, 0.5), reduction="mean"):
    """The loss written with torch's own cross-entropy over logits."""
    labels = torch.arange(len(x))
    per_image, per_text = logits(x, torch.cat([y, negative_texts])), logits(y, torch.cat([x, negative_images]))
    by_image, by_text = (
        F.cross_entropy(each, labels, label_smoothing=smoothing, reduction=reduction) for each in (per_image, per_text)
    )
    return weights[0] * by_image + weights[1] * by_text


def features(embeddings, n, texts, images, d=12, cosine=None):
    x, y = embeddings(n, n, d, cosine=cosine, seed=n)
    return x, y, *embeddings(texts, images, d, seed=n + 1)


def ours(loss):
    def call(x, y, negative_texts, negative_images, scale):
        return loss(
            x,
            y,
            scale,
            negative_text_features=negative_texts if len(negative_texts) else None,
            negative_image_features=negative_images if len(negative_images) else None,
        ).sum()

    return call


OPTIONS = list(itertools.product([0.0, 0.1, 1.0], [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.3, 1.2)]))


@pytest.mark.parametrize(("texts", "images"), [(0, 0), (5, 0), (0, 7), (40, 3)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_option_equals_the_dense_formula(backend, embeddings, texts, images, reduction):
    for (smoothing, weights), scale in zip(OPTIONS, itertools.cycle([1.0, 14.3, 100.0, 10.0, 30.0])):
        loss = ClipLoss(label_smoothing=smoothing, direction_weights=weights, reduction=reduction)

        def formula(*args, smoothing=smoothing, weights=weights):
            value = dense(*args, smoothing=smoothing, weights=weights, reduction=reduction)
            return value.sum()

        assert_as_exact(ours(loss), formula, features(embeddings, 33, texts, images), scale)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_agree_under_every_option(backend, embeddings, reduction):
    inputs = [each.float() for each in features(embeddings, 17, 5, 3)]
    for smoothing, weights in OPTIONS:
        options = {"label_smoothing": smoothing, "direction_weights": weights}
        terms = ClipLoss(**options, reduction="none")(*inputs[:2], 9.0, negative_text_features=inputs[2])
        given = ClipLoss(**options, reduction=reduction)(*inputs[:2], 9.0, negative_text_features=inputs[2])
        assert terms.shape == (17,)
        # Sums of 17 float32 numbers in another order.
        torch.testing.assert_close(given, getattr(terms, reduction)(), rtol=2e-6, atol=1e-6)


def test_a_direction_of_weight_zero_is_not_computed(backend, embeddings):
    x, y = (each.float().requires_grad_() for each in embeddings(8, 8, 4))
    unused = torch.full((3, 4), torch.nan, requires_grad=True)
    loss = ClipLoss(direction_weights=(1.0, 0.0))(x, y, 5.0, negative_image_features=unused)
    assert torch.equal(loss, ClipLoss(direction_weights=(1.0, 0.0))(x, y, 5.0))
    assert torch.autograd.grad(loss, unused, allow_unused=True) == (None,)


def test_extra_negatives_of_well_aligned_pairs_do_not_cancel(backend, embeddings):
    """The positive's weight p - 1 is small here; the truth is the softplus form in float64."""

    def softplus_form(logits, x, y, negative_texts, negative_images):
        total = 0
        for rows, columns in ((x, torch.cat([y, negative_texts])), (y, torch.cat([x, negative_images]))):
            scores = logits(rows, columns)
            others = torch.where(torch.eye(*scores.shape, dtype=torch.bool), -torch.inf, scores).logsumexp(1)
            total = total + F.softplus(others - scores.diagonal()).mean() / 2
        return total

    inputs = [each.float().double().requires_grad_() for each in features(embeddings, 64, 20, 10, d=32, cosine=0.95)]
    truth = torch.autograd.grad(softplus_form(lambda a, b: 30 * a @ b.T, *inputs), inputs)
    narrow = [each.detach().float().requires_grad_() for each in inputs]
    given = torch.autograd.grad(ours(ClipLoss())(*narrow, 30.0), narrow)
    # What remains is the rounding of a score of 30 in an exponent, half an ulp of it where it is taken in float64 first;
    # the oracle's product is float32.
    bound = 30 * (2.5e-7 if backend == "reference" else 8e-8)
    for one, right in zip(given, truth):
        assert (one - right).norm() <= bound * right.norm()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1: expected a number from 0 to 1"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5"),
        ({"direction_weights": (0, 0)}, r"direction_weights=\(0, 0\): expected two numbers of at least 0, not both 0"),
        ({"direction_weights": (1, -1)}, r"direction_weights=\(1, -1\)"),
        ({"direction_weights": 0.5}, r"direction_weights=0.5"),
        ({"direction_weights": (1, 1, 1)}, r"direction_weights=\(1, 1, 1\)"),
    ],
)
def test_values_outside_their_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ClipLoss(**options)


def test_negatives_that_do_not_fit_are_refused():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"negative_text_features has shape \[2, 5\]: expected \[any, 4\]"):
        ClipLoss()(x, x, 1.0, negative_text_features=torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"negative_image_features is torch.int64"):
        ClipLoss()(x, x, 1.0, negative_image_features=torch.zeros(2, 4, dtype=torch.long))
