"""Terms of rows in blocks, as the momentum loss takes them on the CPU: the same as in one piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pairtile.kernels import MomentumDistillationLoss, use_backend, use_memory_budget


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    n, queue, width = 530, 90, 16  # of three blocks, the last one short
    return [F.normalize(torch.randn(rows, width), dim=1).to(dtype) for rows in (n, n, n, n, queue, queue)]


def outcome(features, scale, upstream, **options):
    images, texts, *rest = features
    leaves = [each.detach().clone().requires_grad_() for each in (images, texts, scale)]
    terms = MomentumDistillationLoss(reduction="none", **options)(*leaves, *rest)
    return [terms.detach(), *torch.autograd.grad(terms, leaves, upstream.to(terms.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_blocks_change_nothing(cpp, dtype, shape):
    features, upstream = inputs(dtype), torch.randn(530, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(14.3).reshape(shape)
    with use_memory_budget(1):
        in_blocks = outcome(features, scale, upstream)
    in_one_piece = outcome(features, scale, upstream)
    with use_backend("reference"):
        truth = outcome([each.double() for each in features], scale.double(), upstream)
    # bfloat16 gradients are rounded, in blocks once more: for the block, and after the upstream gradient.
    bound = 2e-6 if dtype == torch.float32 else 6e-3
    with use_backend("reference"):
        size = size_of_scale_gradient([each.double() for each in features], scale.double(), upstream)
    sizes = [0.0, 0.0, 0.0, size]
    for name, a, b, right, least in zip(("terms", "dx", "dy", "dscale"), in_blocks, in_one_piece, truth, sizes):
        assert a.shape == b.shape == right.shape, name
        for found in (a, b):
            assert float((found.double() - right).norm()) <= bound * max(float(right.norm()), least), name


def size_of_scale_gradient(features, scale, upstream):
    """sum_i |upstream_i d term_i / d scale|: the gradient itself is a sum of either sign that passes through zero."""
    leaf = scale.detach().clone().requires_grad_()
    terms = MomentumDistillationLoss(reduction="none")(*features[:2], leaf, *features[2:])
    derivatives = [torch.autograd.grad(term, leaf, retain_graph=True)[0].abs().sum() for term in terms]
    return float((torch.stack(derivatives) * upstream.double().abs()).sum())


def test_not_twice_and_not_without_gradient(cpp):
    images, texts, *rest = inputs(torch.float32)
    with use_memory_budget(1):
        with torch.no_grad():
            value = MomentumDistillationLoss()(images, texts, 14.3, *rest)
        images.requires_grad_()
        loss = MomentumDistillationLoss()(images, texts, 14.3, *rest)
    torch.testing.assert_close(loss.detach(), value)
    (dx,) = torch.autograd.grad(loss, images, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()
