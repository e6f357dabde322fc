"""Late interaction against misuse: what is written to before a backward, wrong shapes, dropped pairs, extreme numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile.kernels import ClipLoss, FilipLoss, MaxPooling, SoftmaxPooling, maxsim, maxsim_varlen, over_scores
from pairtile.kernels.late_interaction import bipartite_similarity, finite_tokens, most_similar_tokens, sparsemax


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


@pytest.mark.parametrize("pooling", [MaxPooling(), SoftmaxPooling(0.1)], ids=str)
def test_a_mask_written_to_before_the_backward_is_noticed(backend, pooling):
    if backend == "reference":
        pytest.skip("plain autograd keeps its own masks")
    q, d, mask = unit(2, 4, 8).requires_grad_(), unit(3, 5, 8).requires_grad_(), torch.ones(3, 5, dtype=torch.bool)
    scores = maxsim(q, d, None, mask, pooling=pooling)
    mask[:, 3:] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()
    bounds = torch.tensor([0, 5, 15])
    scores = maxsim_varlen(q.flatten(0, 1), torch.tensor([0, 8]), d.flatten(0, 1), bounds, pooling=pooling)
    bounds[1] = 7
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_nothing_is_kept_where_no_gradient_is_taken(backend):
    q, d = unit(2, 4, 8).requires_grad_(), unit(3, 5, 8).requires_grad_()
    with torch.no_grad():
        scores = maxsim(q, d)
    assert scores.grad_fn is None
    torch.testing.assert_close(scores, maxsim(q, d).detach())


def test_masks_in_another_order_are_refused(backend):
    x, candidates = unit(2, 4, 8), unit(2, 3, 5, 8)
    for shape in ((3, 2, 5), (6, 5)):
        mask = torch.ones(shape, dtype=torch.bool)
        for function in (maxsim, bipartite_similarity):
            with pytest.raises(ValueError, match=r"expected a bool tensor of shape \[2, 3, 5\]"):
                function(x, candidates, None, mask)
    with pytest.raises(ValueError, match=r"expected a bool tensor of shape \[3, 5\]"):
        most_similar_tokens(x, unit(3, 5, 8), 0.5, None, torch.ones(5, 3, dtype=torch.bool))


def test_selection_ignores_pairs_that_are_dropped(backend):
    x, y, mask = unit(3, 4, 8), unit(3, 4, 8), torch.ones(3, 4, dtype=torch.bool)
    mask[2] = False
    loss = FilipLoss(select_tokens=0.5)
    expected = loss(x[:2], y[:2], 5.0)
    for other in (y[2], 10 * y[2], torch.full_like(y[2], torch.nan)):
        found = loss(x, torch.stack([y[0], y[1], other]), 5.0, mask)
        torch.testing.assert_close(found, expected)
        assert loss.dropped_pairs == 1


@pytest.mark.parametrize(("shape", "start"), [((2, 5), 0), ((3, 3), 1), ((3, 3), -1), ((5, 3), 0), ((3,), 0)])
def test_given_scores_of_another_shape_are_refused(shape, start):
    with pytest.raises(ValueError, match="expected"):
        over_scores(ClipLoss(), torch.randn(shape), start=start)


def test_sparsemax_of_large_scores_and_of_what_is_no_number():
    assert sparsemax(torch.tensor([1e8, 0.0])).tolist() == [1.0, 0.0]
    close = torch.tensor([1e6 + 0.25, 1e6, 1e6 - 0.125])
    torch.testing.assert_close(sparsemax(close).double(), sparsemax(close.double()), atol=1e-6, rtol=0)
    assert sparsemax(torch.tensor([torch.nan, 1.0])).isnan().all()
    tokens = unit(2, 3, 8)
    tokens[0, 1, 2] = torch.nan
    vectors, _ = finite_tokens(tokens, unit(6, 8))
    assert vectors[0].isnan().all()
    assert vectors[1].isfinite().all()
