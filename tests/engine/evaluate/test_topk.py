"""Streaming top-k against a stable sort of the dense matrix."""

import math

import pytest
import torch

from pairtile.engine.evaluate import topk_scores


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
@pytest.mark.parametrize(("queries", "candidates", "k"), [(1, 1, 1), (23, 57, 5), (9, 4, 10), (3, 300, 300)])
def test_equals_a_stable_sort(queries: int, candidates: int, k: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(k)
    x = torch.randint(-2, 3, (queries, 4), generator=generator).float()
    y = torch.randint(-2, 3, (candidates, 4), generator=generator).float()
    expected = (x @ y.T).sort(dim=1, descending=True, stable=True)
    scores, indices = topk_scores(x, y, k, chunk=chunk)
    assert scores.shape == (queries, min(k, candidates))
    assert torch.equal(indices, expected.indices[:, :k])
    assert torch.equal(scores, expected.values[:, :k])


def test_equals_torch_without_ties() -> None:
    x, y = torch.randn(20, 16), torch.randn(400, 16)
    expected = (x @ y.T).topk(7, dim=1)
    scores, indices = topk_scores(x, y, 7, chunk=900)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(scores, expected.values)


def test_nan_comes_last_and_signed_zeros_are_equal() -> None:
    x = torch.ones(1, 1)
    y = torch.tensor([[math.nan], [-0.0], [0.0], [-1.0], [math.inf], [-math.inf]])
    _, indices = topk_scores(x, y, 6)
    assert indices.tolist() == [[4, 1, 2, 3, 0, 5]]


def test_no_candidates_and_a_wrong_chunk() -> None:
    scores, indices = topk_scores(torch.ones(3, 2), torch.ones(0, 2), 5)
    assert scores.shape == indices.shape == (3, 0)
    with pytest.raises(ValueError, match="at least 1"):
        topk_scores(torch.ones(3, 2), torch.ones(3, 2), 1, chunk=0)
