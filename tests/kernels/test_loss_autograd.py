"""What autograd, torch.compile and activation checkpointing ask of every loss, whatever its formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pairtile.kernels import ClipLoss, CoCaLoss, SigLipLoss, linear_cross_entropy, use_backend

TARGETS = torch.tensor([3, 0, -100, 10, 3, 7, -100, 1, 2])
LABELS = torch.tensor([[1, 2], [3, 0], [4, 5], [6, 0], [7, 8], [9, 9], [10, 0], [1, 0], [2, 2]])


def clip(x, y, scale):
    return ClipLoss(label_smoothing=0.1)(x, y, scale)


def one_directional(x, y, scale):
    return ClipLoss(direction_weights=(0.0, 1.0))(x, y, scale)


def clip_with_negatives(x, y, scale):
    return ClipLoss()(x, y, scale, negative_text_features=y[:4].flip(1), negative_image_features=x[2:5].flip(1))


def siglip(x, y, scale):
    return SigLipLoss()(x, y, scale, -0.5 * scale)


def captions(x, y, scale):
    return linear_cross_entropy(x, torch.cat([y, y[:2] * 0.5]), TARGETS, scale=scale)


def captions_with_bias(x, y, scale):
    return linear_cross_entropy(x, torch.cat([y, y[:2] * 0.5]), TARGETS, scale=scale, bias=torch.arange(11.0))


def coca(x, y, scale):
    hidden, vocabulary = torch.stack([x, y], 1), torch.cat([x, y[:2]])
    return sum(CoCaLoss(2.0, 1.0)(x, y, None, LABELS, scale, hidden_states=hidden, vocab_weight=vocabulary))


LOSSES = [clip, one_directional, clip_with_negatives, siglip, captions, captions_with_bias, coca]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


@pytest.fixture
def leaves(embeddings):
    x, y = embeddings(9, 9, 6)
    return [each.float().requires_grad_() for each in (x, y, torch.tensor(5.0))]


@every_loss
def test_an_upstream_gradient_other_than_one(backend, leaves, loss):
    plain = torch.autograd.grad(loss(*leaves), leaves)
    for factor in (-2.5, 0.0):
        scaled = torch.autograd.grad(loss(*leaves), leaves, grad_outputs=torch.tensor(factor))
        for one, other in zip(scaled, plain):
            # Scaled before or after the sums: each term is rounded once more.
            torch.testing.assert_close(one, factor * other, rtol=2e-6, atol=2e-7)


@every_loss
def test_backward_twice_through_a_retained_graph(backend, leaves, loss):
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves, retain_graph=True)
    for one, other in zip(first, second):
        assert torch.equal(one, other)
    # A backend may hand out the gradient that it keeps. Whoever changes that must not get a wrong one in silence.
    kept = [each.clone() for each in second]
    for each in (*first, *second):
        each.fill_(torch.nan)
    error, third = None, ()
    try:
        third = torch.autograd.grad(value, leaves)
    except RuntimeError as refused:
        error = str(refused)
    assert error is None or "modified by an inplace operation" in error
    assert all(torch.equal(one, other) for one, other in zip(third, kept))


@every_loss
def test_only_what_needs_a_gradient_gets_one(backend, leaves, loss):
    everything = torch.autograd.grad(loss(*leaves), leaves)
    for wanted in itertools.product([False, True], repeat=3):
        inputs = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, wanted)]
        value = loss(*inputs)
        assert value.requires_grad == any(wanted)
        if any(wanted):
            value.backward()
        for given, need, expected in zip(inputs, wanted, everything):
            assert (given.grad is not None) == need
            if need:
                # Which gradients are asked for may change the order of summation, nothing else.
                torch.testing.assert_close(given.grad, expected, rtol=2e-6, atol=2e-7)


@every_loss
def test_the_value_does_not_depend_on_the_gradient(backend, leaves, loss):
    with torch.no_grad():
        value = loss(*leaves)
    assert not value.requires_grad
    # With gradients a sum may be taken in another order.
    torch.testing.assert_close(value, loss(*leaves).detach(), rtol=1e-6, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(loss(*leaves), value, rtol=1e-6, atol=0)


@every_loss
def test_checkpointing_changes_nothing(backend, leaves, loss):
    plain, replayed = loss(*leaves), checkpoint(loss, *leaves, use_reentrant=False)
    assert torch.equal(plain, replayed)
    for one, other in zip(torch.autograd.grad(replayed, leaves), torch.autograd.grad(plain, leaves)):
        assert torch.equal(one, other)


@every_loss
def test_autocast_changes_nothing(backend, leaves, loss):
    expected = loss(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        given = loss(*leaves)
    assert given.dtype == torch.float32
    assert torch.equal(given, expected)
    for one, other in zip(torch.autograd.grad(given, leaves), torch.autograd.grad(expected, leaves)):
        assert torch.equal(one, other)


# The dense backend is plain PyTorch: that it compiles says nothing about us.
@pytest.mark.parametrize("backend", ["torch", "cpp"], indirect=True)
@every_loss
def test_a_training_step_compiles_into_one_graph(backend, leaves, loss):
    torch.compiler.reset()
    given, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), loss(*leaves)
    # Ignored tokens stay in a compiled sweep, at weight 0: sums of float32 in another order.
    torch.testing.assert_close(given, expected, rtol=2e-6, atol=0)
    for one, other in zip(torch.autograd.grad(given, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)


@every_loss
def test_a_double_backward_works_or_says_why_not(backend, leaves, loss):
    gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    penalty = sum(each.square().sum() for each in gradients)
    if backend == "reference":
        assert all(each.isfinite().all() for each in torch.autograd.grad(penalty, leaves))
    else:
        with pytest.raises(RuntimeError, match=r"differentiated twice.*reference"):
            torch.autograd.grad(penalty, leaves)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_two_dtypes_are_promoted(backend, leaves, loss, dtype):
    x, y, scale = (leaf.detach() for leaf in leaves)
    narrow = x.to(dtype).requires_grad_()
    value = loss(narrow, y, scale)
    assert torch.equal(value, loss(narrow.detach().float(), y, scale))
    (gradient,) = torch.autograd.grad(value, narrow)
    assert gradient.dtype == dtype


def test_non_contiguous_and_expanded_features(backend, leaves):
    x, y, scale = (leaf.detach() for leaf in leaves)
    for loss in LOSSES:
        expected = loss(x, y, scale)
        wide = torch.cat([y, y], 1)[:, : y.shape[1]]
        torch.testing.assert_close(loss(x.T.contiguous().T, wide, scale), expected, rtol=1e-6, atol=0)
        same = x[:1].expand(9, -1)
        torch.testing.assert_close(loss(same, y, scale), loss(same.contiguous(), y, scale), rtol=1e-6, atol=0)


def test_the_backend_of_the_forward_serves_the_backward(leaves):
    with use_backend("torch"):
        value = clip(*leaves)
        expected = torch.autograd.grad(clip(*leaves), leaves)
    with use_backend("reference"):
        given = torch.autograd.grad(value, leaves)
    for one, other in zip(given, expected):
        assert torch.equal(one, other)
