"""`linear_cross_entropy` against `F.cross_entropy(F.linear(...))`, and what it does with ignored tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from against_float64 import assert_as_exact
from pairtile.kernels import linear_cross_entropy


def tokens(n, v, d, *, ignored=0.0, seed=0):
    """Hidden states and a vocabulary in float64, and targets, a part of which is -100."""
    generator = torch.Generator().manual_seed(seed)
    hidden, vocabulary = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, v))
    targets = torch.randint(v, (n,), generator=generator)
    return hidden, vocabulary, targets.masked_fill(torch.rand(n, generator=generator) < ignored, -100)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize(("n", "v", "d"), [(1, 1, 3), (1, 50, 7), (65, 129, 33), (40, 1000, 16)])
def test_equals_the_dense_formula(backend, some, n, v, d, ignored, with_bias):
    hidden, vocabulary, targets = tokens(n, v, d, ignored=ignored, seed=n)
    if ignored:
        targets[0] = v - 1  # at least one counts
    bias = [torch.linspace(-2, 2, v, dtype=torch.float64)] if with_bias else []
    for reduction in some(("sum", "none", "mean")):

        def dense(logits, hidden, vocabulary, bias=0.0, reduction=reduction):
            scores = logits(hidden, vocabulary) + bias
            return F.cross_entropy(scores, targets, reduction=reduction).sum()

        def ours(hidden, vocabulary, *rest, reduction=reduction):
            bias, scale = rest if with_bias else (None, *rest)
            return linear_cross_entropy(hidden, vocabulary, targets, bias=bias, scale=scale, reduction=reduction).sum()

        for scale in some((1.0, 6.0)):
            assert_as_exact(ours, dense, [hidden, vocabulary, *bias], scale)


@pytest.mark.parametrize("with_bias", [False, True])
def test_leading_dimensions_and_another_ignored_index(backend, with_bias):
    hidden, vocabulary, targets = tokens(12, 20, 5)
    hidden, targets = hidden.float().view(3, 4, 5), targets.view(3, 4)
    bias = torch.arange(20.0) if with_bias else None
    logits = F.linear(hidden, vocabulary.float(), bias).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=7, reduction="none").view(3, 4)
    targets[1, 2] = 7
    expected[1, 2] = 0
    given = linear_cross_entropy(hidden, vocabulary.float(), targets, bias=bias, ignore_index=7, reduction="none")
    # float32, logits of size 5 to 20.
    torch.testing.assert_close(given, expected, rtol=2e-6, atol=1e-5)
    assert given[1, 2] == 0


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n", [0, 6])
def test_all_ignored_is_nan_in_the_mean_and_has_no_gradient(backend, n, with_bias):
    hidden, vocabulary, _ = tokens(n, 9, 4)
    targets = torch.full((n,), -100)
    bias = torch.zeros(9, requires_grad=True) if with_bias else None
    leaves = [hidden.float().requires_grad_(), vocabulary.float().requires_grad_()]
    for reduction, value in (("mean", torch.nan), ("sum", 0.0)):
        loss = linear_cross_entropy(*leaves, targets, bias=bias, reduction=reduction)
        torch.testing.assert_close(loss, torch.tensor(value), equal_nan=True)
        for gradient in torch.autograd.grad(loss, [*leaves, *([bias] if with_bias else [])]):
            assert not gradient.any()
    terms = linear_cross_entropy(*leaves, targets, bias=bias, reduction="none")
    assert terms.shape == (n,)
    assert not terms.any()


def test_ignored_tokens_cost_nothing_and_may_hold_anything(backend):
    hidden, vocabulary, targets = tokens(30, 11, 6, ignored=0.5)
    hidden = hidden.float().masked_fill((targets == -100).unsqueeze(1), torch.nan).requires_grad_()
    loss = linear_cross_entropy(hidden, vocabulary.float(), targets)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[targets == -100].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_states_give_a_float32_loss(backend, dtype):
    hidden, vocabulary, targets = tokens(64, 200, 16, ignored=0.2)
    hidden, vocabulary = hidden.to(dtype), vocabulary.to(dtype)
    exact = [hidden.double().requires_grad_(), vocabulary.double().requires_grad_()]
    truth = F.cross_entropy(exact[0] @ exact[1].T, targets)
    leaves = [hidden.requires_grad_(), vocabulary.requires_grad_()]
    loss = linear_cross_entropy(*leaves, targets)
    assert loss.dtype == torch.float32
    # Accumulated in float32, as every score is.
    assert abs(loss.item() - truth.item()) <= 2e-6 * truth.item()
    for given, right in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact)):
        assert given.dtype == dtype
        # The weights p are rounded to the input type before they multiply, half an eps each, and the result is
        # rounded once more.
        assert (given - right).norm() <= torch.finfo(dtype).eps * right.norm()


# The dense backend is plain PyTorch: that it compiles says nothing about us.
@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"], indirect=True)
def test_terms_and_assertions_under_torch_compile(backend):
    torch.compiler.reset()
    hidden, vocabulary, targets = tokens(24, 40, 8, ignored=0.3)
    leaves = [hidden.float().requires_grad_(), vocabulary.float().requires_grad_()]

    def step(targets):
        return linear_cross_entropy(*leaves, targets, reduction="none")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given, expected = compiled(targets), step(targets)
    # Ignored rows stay in the compiled sweep: sums of float32 in another order.
    torch.testing.assert_close(given, expected, rtol=2e-6, atol=2e-6)
    for one, other in zip(torch.autograd.grad(given.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
    for wrong in (40, -7):
        with pytest.raises(RuntimeError, match="neither in the vocabulary nor ignored"):
            compiled(targets.index_fill(0, torch.tensor([5]), wrong))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"targets": torch.tensor([0, 5])}, ValueError, "targets holds 5: expected 0 to 4, rows of the vocabulary, or"),
        ({"targets": torch.tensor([0, -1])}, ValueError, "targets holds -1: .*ignore_index=-100"),
        ({"targets": torch.tensor([0])}, ValueError, r"targets has shape \[1\]: expected \[2\]"),
        ({"targets": torch.tensor([0.0, 1.0])}, TypeError, "targets is torch.float32: expected an int64"),
        ({"hidden": torch.zeros(2, 4)}, ValueError, r"hidden \[2, 4\] and vocabulary \[5, 3\] differ"),
        ({"hidden": [[1.0]]}, TypeError, "hidden is list"),
        ({"vocabulary": torch.zeros(5)}, ValueError, r"vocabulary has shape \[5\]"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias is a torch.float32 tensor of shape \[4\]: .* of shape \[5\]"),
        ({"bias": torch.zeros(5).long()}, ValueError, "bias is a torch.int64 tensor"),
        ({"bias": [0.0]}, ValueError, r"bias is \[0.0\]"),
        ({"scale": torch.ones(2)}, ValueError, r"scale is .* of shape \[2\]: expected a number, or a tensor of shape"),
        ({"reduction": "avg"}, ValueError, "reduction='avg'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, error, said):
    good = {"hidden": torch.zeros(2, 3), "vocabulary": torch.zeros(5, 3), "targets": torch.tensor([0, 4])}
    with pytest.raises(error, match=said):
        linear_cross_entropy(**(good | change))
