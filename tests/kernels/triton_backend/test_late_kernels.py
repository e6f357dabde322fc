"""The Triton kernels of late interaction in the interpreter: what they do to memory, and what they find."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pairtile.kernels import MaxPooling, SoftmaxPooling, use_backend
from pairtile.kernels.late_interaction import triton_backend, triton_gathers
from pairtile.kernels.late_interaction.backends import Request
from pairtile.kernels.late_interaction.scores import token_scores
from pairtile.kernels.late_interaction.token_sets import TokenSets, padded_sets
from triton_late import LATE_CALLS, LONG, integers, scored, sides

#: The kernels that each call is there for.
KERNELS = {
    "both long": {"max_long", "gather_sum"},
    "candidates, long": {"max_long", "gather_sum"},
    "softmax": {"soft_sweep", "soft_gradient"},
    "softmax, candidates": {"soft_sweep", "soft_gradient"},
    "softmax, nothing kept": {"soft_sweep", "soft_gradient"},
    "log-sum-exp, long": {"soft_sweep", "soft_gradient"},
}


@pytest.mark.parametrize("name", LATE_CALLS)
def test_memory_order_and_results(gpu_safety, name):
    found = gpu_safety(LATE_CALLS[name])
    assert {kernel for kernel, _ in gpu_safety.launches} == KERNELS.get(name, {"max_sweep", "gather_sum"})
    with use_backend("reference"):
        expected = LATE_CALLS[name]()
    for given, truth in zip(found, expected, strict=True):
        # Scores of integers are exact; gradients, sums of products in another order, and soft maxima are not.
        torch.testing.assert_close(given, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "candidates"),
    [((3, 5, 4, 9), 0), ((3, 9, 4, 5), 0), ((2, LONG, 3, 40), 0), ((2, LONG, 2, LONG), 0), ((3, 5, 6, LONG), 2)],
)
def test_positions_are_those_of_the_first_maxima(shape, candidates):
    x, y = sides(*shape, 20)
    request = Request(MaxPooling(), candidates, True, True, 1 << 20)
    scores, (rows, cols) = triton_backend.KERNELS.forward(x, y, request, True)
    with use_backend("reference"):
        expected = token_scores(x, y, pooling=MaxPooling(), candidates=candidates, cols=True)
    assert all(map(torch.equal, scores, expected))
    of_x, of_y = _first_maxima(x, y, candidates), _first_maxima(y, x, 0)
    if candidates:
        of_x = torch.stack([_per_set(of_x, x, candidates, k) for k in range(candidates)])
        of_y = torch.stack([of_y[s // candidates, y.owners() == s] for s in range(y.count)]).view(1, -1)
    assert torch.equal(rows[0][:, x.keep], of_x[:, x.keep].int())
    assert torch.equal(cols[0][:, y.keep], of_y[:, y.keep].int())


def _first_maxima(x: TokenSets, y: TokenSets, candidates: int) -> torch.Tensor:
    """[sets of y, rows of x]: the first of the largest products of a row with a set, -1 for an empty set."""
    product = (x.tokens.nan_to_num() @ y.tokens.nan_to_num().T).masked_fill(~y.keep, -torch.inf)
    by_set = product.view(len(product), y.count, -1)
    return by_set.argmax(2).masked_fill((by_set == -torch.inf).all(2), -1).T


def _per_set(chosen: torch.Tensor, x: TokenSets, candidates: int, k: int) -> torch.Tensor:
    """Of all positions those in candidate k of each row's own set."""
    return chosen[x.owners() * candidates + k, torch.arange(chosen.shape[1])]


@pytest.mark.parametrize("side", ["x", "y"])
def test_nan_in_a_token_that_counts_is_not_lost(side):
    x, y = integers(2, 5, 8), integers(2, LONG, 8, seed=1)
    (x if side == "x" else y)[1, 3] = torch.nan
    with use_backend("triton"):
        rows, cols = token_scores(padded_sets(x, None, "x"), padded_sets(y, None, "y"), pooling=MaxPooling(), cols=True)
    touched = torch.tensor([[False, False], [True, True]])
    for each in (rows, cols):
        assert torch.equal(each.isnan(), touched if side == "x" else touched.T)


@pytest.mark.parametrize(
    ("dtype", "pooling", "width"),  # D in one piece, in chunks
    [
        (torch.float16, MaxPooling(), 20),
        (torch.bfloat16, MaxPooling(), 272),
        (torch.bfloat16, SoftmaxPooling(2.0), 20),
        (torch.float16, SoftmaxPooling(2.0), 136),
    ],
    ids=str,
)
def test_sixteen_bits(dtype, pooling, width):
    x, y = sides(3, 5, 4, 9, width, dtype=dtype)
    with use_backend("triton"):
        found = scored(x, y, pooling=pooling, cols=True)
    wide = [each.with_tokens(each.tokens.double()) for each in (x, y)]
    with use_backend("reference"):
        expected = scored(*wide, pooling=pooling, cols=True)
    for k, (given, truth) in enumerate(zip(found, expected, strict=True)):
        # Gradients are rounded once to the dtype, and so are the weights of a softmax.
        bound = 5e-6 if k < 2 else 2 * torch.finfo(dtype).eps
        finite = truth.isfinite()
        assert torch.equal(given.isfinite(), finite)
        assert (given.double() - truth)[finite].norm() <= bound * truth[finite].norm(), k


def test_upstream_gradients_beyond_the_range_of_float16():
    x, y = sides(3, 5, 4, 9, 8, dtype=torch.float16)
    found = []
    for factor in (1.0, 2.0**-24):
        leaves = [each.tokens.detach().requires_grad_() for each in (x, y)]
        with use_backend("triton"):
            sets = (each.with_tokens(leaf) for each, leaf in zip((x, y), leaves, strict=True))
            (scores,) = token_scores(*sets, pooling=SoftmaxPooling(2.0))
        factors = torch.full_like(scores, factor).masked_fill(scores.isinf(), 0)
        # A scaled gradient comes back as one that float16 still holds: 2^-24 is its smallest number.
        scores.backward(factors)
        found.append(leaves[0].grad.double())
    expected = (found[0] * 2.0**-24).half().double()
    assert (found[1] - expected).abs().max() <= 2.0**-24


def test_the_gradient_of_few_rows_per_program(monkeypatch):
    """As it is launched on a GPU; the interpreter otherwise gets more rows."""
    with use_backend("triton"):
        expected = LATE_CALLS["candidates"]()
        monkeypatch.setattr(triton_gathers, "gather_tile", lambda width, interpreted: (4, 4, 16))
        found = LATE_CALLS["candidates"]()
    assert all(map(torch.equal, found, expected))
