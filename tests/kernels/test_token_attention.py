"""Attention among merged tokens: log(size) on the key axis, by a mask and by folded columns, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pairtile.kernels.token_merging import AttentionTo, fold_size, proportional_attention

FORMS = ["mask", "fold"]


def inputs(dtype: torch.dtype, width: int = 16, v_width: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, 3, 13, each, generator=generator).to(dtype) for each in (width, width, v_width)]
    size = torch.randint(1, 400, (2, 13), generator=generator).float()
    return *(each.requires_grad_() for each in heads), size


def formula(q: Tensor, k: Tensor, v: Tensor, size: Tensor, scale: float) -> Tensor:
    """In float64, by the weights themselves: size * exp(score) over its sum."""
    q, k, v = (each.double() for each in (q, k, v))
    weights = (scale * q @ k.transpose(2, 3)).exp() * size.double()[:, None, None, :]
    return weights / weights.sum(-1, keepdim=True) @ v


def test_equal_keys_count_as_often_as_they_were_merged():
    """Attention over tokens, some of them copies, is proportional attention over the distinct ones."""
    q, k, v, _ = inputs(torch.float64)
    copies = torch.tensor([1, 3, 1, 1, 7, 1, 1, 2, 1, 1, 1, 1, 5])
    whole = F.scaled_dot_product_attention(q, k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2))
    torch.testing.assert_close(proportional_attention(q, k, v, copies.expand(2, -1)), whole, rtol=1e-12, atol=1e-12)


# Rounding of the outputs and gradients in each dtype. In bfloat16 the weights are rounded too; a bias in a single
# bfloat16 column would be off by 2^-9 of its value, which is 1e-2 at size 400.
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "v_width", "scale"), [(16, 16, None), (7, 12, 0.3)])
def test_values_and_gradients(form, dtype, close, width, v_width, scale, relative_error):
    q, k, v, size = inputs(dtype, width, v_width)
    found = proportional_attention(q, k, v, size.unsqueeze(-1), scale=scale, form=form)
    assert found.dtype == dtype
    truth_inputs = [each.detach().double().requires_grad_() for each in (q, k, v)]
    truth = formula(*truth_inputs, size, scale or width**-0.5)
    assert relative_error(found, truth) < close
    weight = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((found.double() * weight).sum(), (q, k, v))
    for given, right in zip(grads, torch.autograd.grad((truth * weight).sum(), truth_inputs), strict=True):
        # Three roundings of bfloat16 meet in the gradients of q and k.
        assert relative_error(given, right) < 3 * close


def test_the_folded_bias_is_two_columns_exact_to_sixteen_bits():
    q, k, v, size = inputs(torch.bfloat16)
    wide_q, wide_k, wide_v = fold_size(q, k, v, size, 0.25)
    assert wide_q.shape[-1] == wide_k.shape[-1] == wide_v.shape[-1] == 24
    assert wide_q.dtype == wide_k.dtype == torch.bfloat16
    scores = 0.25 * wide_q.double() @ wide_k.double().transpose(2, 3)
    bias = scores - 0.25 * q.double() @ k.double().transpose(2, 3)
    # 8 bits in each column leave 2^-17 of log(400) = 6, or 5e-5; one column alone leaves 1e-2.
    assert (bias - size.double().log()[:, None, None, :]).abs().max() < 6e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_key_of_no_size_is_masked(form, dtype):
    q, k, v, size = inputs(dtype)
    size[:, 5:] = 0
    for scale in (0.25, 0.01):
        found = proportional_attention(q, k, v, size, scale=scale, form=form)
        alone = proportional_attention(q, k[:, :, :5], v[:, :, :5], size[:, :5], scale=scale, form=form)
        torch.testing.assert_close(found, alone)


def model_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    with AttentionTo(size):
        return F.scaled_dot_product_attention(2 * q, k, v)


def test_a_models_own_call_is_answered_compiled_and_checkpointed_too():
    q, k, v, size = inputs(torch.float32)
    right = proportional_attention(2 * q, k, v, size)
    right_grads = torch.autograd.grad(right.square().sum(), (q, k, v))
    compiled = torch.compile(model_attention, fullgraph=True, backend="aot_eager")
    for answer in (
        model_attention,
        compiled,
        lambda *given: checkpoint(model_attention, *given, use_reentrant=False),
    ):
        found = answer(q, k, v, size)
        torch.testing.assert_close(found, right)
        grads = torch.autograd.grad(found.square().sum(), (q, k, v))
        for given, expected in zip(grads, right_grads, strict=True):
            torch.testing.assert_close(given, expected)


def test_autocast_rounds_the_inputs_and_not_the_bias():
    q, k, v, size = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = model_attention(q, k, v, size)
    rounded = (each.to(torch.bfloat16) for each in (2 * q, k, v))
    assert torch.equal(found, proportional_attention(*rounded, size))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_sixteen_bits_run_flash_kernels(relative_error):
    q, k, v, size = (each.detach().cuda() for each in inputs(torch.bfloat16))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it cannot serve
        found = proportional_attention(q, k, v, size)
    assert relative_error(found, formula(q, k, v, size, 0.25)) < 6e-3


def test_bad_input_is_told():
    q, k, v, size = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"size is .* expected \[2, 13\]"):
        proportional_attention(q, k, v, size[:, 1:])
    with pytest.raises(ValueError, match="expected one batch"):
        proportional_attention(q, k[..., 1:], v, size)
    with pytest.raises(ValueError, match='expected "mask", "fold"'):
        proportional_attention(q, k, v, size, form="flash")
    with AttentionTo(size), pytest.raises(ValueError, match="proportional=False"):
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
