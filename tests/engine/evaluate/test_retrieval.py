"""Ranks and recalls against a dense computation, query by query, in plain Python."""

import math

import pytest
import torch

from pairtile.engine.evaluate import (
    Keys,
    RetrievalResult,
    Scoring,
    Side,
    rank_metrics,
    retrieval_metrics,
    retrieval_ranks,
)


def pooled_metrics(
    images: torch.Tensor, texts: torch.Tensor, image_keys: torch.Tensor, text_keys: torch.Tensor, chunk: int = 2**23
) -> RetrievalResult:
    """Of dot products, with one idea of what is correct."""
    (result,) = retrieval_metrics(Side(images), Side(texts), [Keys(image_keys, text_keys)], Scoring(chunk=chunk))
    return result


def dense_ranks(scores: list[list[float]], query_keys: list[list[int]], candidate_keys: list[list[int]]) -> list[int]:
    """The definition, read aloud: exact comparisons of a dense score matrix."""
    ranks = []
    for row, keys in zip(scores, query_keys):
        correct = [any(a == b != -1 for a, b in zip(keys, other)) for other in candidate_keys]
        if not any(correct):
            ranks.append(0)
            continue
        usable = [score for score, right in zip(row, correct) if right and math.isfinite(score)]
        if not usable:
            ranks.append(len(row) + 1)
            continue
        wrong = [score for score, right in zip(row, correct) if not right]
        ranks.append(1 + sum(not score < max(usable) for score in wrong))
    return ranks


def lattice(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Small integers: products are exact in float32, and ties are frequent."""
    return torch.randint(-2, 3, (rows, width), generator=generator).float()


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
@pytest.mark.parametrize(("queries", "candidates", "columns"), [(1, 1, 1), (37, 53, 1), (41, 19, 3), (5, 129, 2)])
def test_ranks_equal_the_dense_definition(queries: int, candidates: int, columns: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(queries + chunk)
    x, y = lattice(queries, 6, generator), lattice(candidates, 6, generator)
    # Keys from a small range: several captions and images per id, and queries without a match (range of 15 and 12).
    query_keys = torch.randint(-1, 15, (queries, columns), generator=generator)
    candidate_keys = torch.randint(-1, 12, (candidates, columns), generator=generator)
    expected = dense_ranks((x @ y.T).tolist(), query_keys.tolist(), candidate_keys.tolist())
    assert retrieval_ranks(x, y, query_keys, candidate_keys, chunk=chunk).tolist() == expected
    for dtype in (torch.float64, torch.bfloat16):  # small integers are exact in bfloat16 too
        assert retrieval_ranks(x.to(dtype), y.to(dtype), query_keys, candidate_keys, chunk=chunk).tolist() == expected


def test_nan_and_infinite_scores_never_help() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = lattice(30, 5, generator), lattice(40, 5, generator)
    y[::3] = math.nan
    x[4] = math.nan
    y[1] = math.inf
    query_keys, candidate_keys = torch.arange(30).unsqueeze(1) % 20, torch.arange(40).unsqueeze(1) % 20
    expected = dense_ranks((x @ y.T).tolist(), query_keys.tolist(), candidate_keys.tolist())
    ranks = retrieval_ranks(x, y, query_keys, candidate_keys, chunk=50)
    assert ranks.tolist() == expected
    assert ranks[4] == 41


def test_a_model_of_nan_scores_zero_even_among_few_candidates() -> None:
    keys = torch.arange(3).unsqueeze(1)
    broken = torch.full((3, 4), math.nan)
    result = pooled_metrics(broken, broken, keys, keys)
    for metrics in (result.image_to_text, result.text_to_image):
        assert (metrics.recall_at_1, metrics.recall_at_5, metrics.recall_at_10) == (0, 0, 0)
        assert metrics.queries == 3


@pytest.mark.parametrize("width", [3, 64, 513])
@pytest.mark.parametrize("count", [33, 1000])
def test_a_collapsed_model_scores_zero(width: int, count: int) -> None:
    """Every embedding is equal: no rounding of the product may let one candidate win."""
    vector = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(1)), dim=0)
    features, keys = vector.expand(count, width).contiguous(), torch.arange(count).unsqueeze(1)
    metrics = pooled_metrics(features, features, keys, keys, chunk=5000).text_to_image
    assert metrics.recall_at_10 == 0
    assert metrics.median_rank == count


def test_scores_apart_by_rounding_alone_are_ties() -> None:
    """Some products of equal vectors differ in the last bit; where they do depends on the machine, so it is made."""
    query, keys = torch.ones(1, 1), torch.arange(3).unsqueeze(1)
    candidates = torch.tensor([[1.0], [1 - 1.2e-7], [1 - 1e-4]])
    assert retrieval_ranks(query, candidates, keys[:1], keys).tolist() == [2]


def test_a_perfect_model_and_an_equivalence() -> None:
    features = torch.eye(6)
    ids = torch.arange(6)
    swapped = features[[1, 0, 2, 3, 4, 5]]
    drawing = torch.tensor([7, 7, -1, -1, -1, -1])
    by_id = pooled_metrics(features, swapped, ids.unsqueeze(1), ids.unsqueeze(1))
    keys = torch.stack([ids, drawing], dim=1)
    by_drawing = pooled_metrics(features, swapped, keys, keys)
    assert by_id.image_to_text.recall_at_1 == pytest.approx(4 / 6)
    assert by_drawing.image_to_text.recall_at_1 == 1
    assert by_drawing.text_to_image.median_rank == 1


def test_equal_captions_of_two_ids_tie_and_count_against_the_model() -> None:
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 2]]
    keys = torch.arange(3).unsqueeze(1)
    to_text = retrieval_ranks(images, texts, keys, keys)
    assert to_text[0] == 2
    assert to_text[2] == 1


def test_metrics_of_given_ranks() -> None:
    metrics = rank_metrics(torch.tensor([1, 0, 3, 6, 11, 40, 41]), candidates=40)
    assert (metrics.queries, metrics.excluded, metrics.candidates) == (6, 1, 40)
    assert metrics.recall_at_1 == pytest.approx(1 / 6)
    assert metrics.recall_at_5 == pytest.approx(2 / 6)
    assert metrics.recall_at_10 == pytest.approx(3 / 6)
    assert metrics.median_rank == 8.5


def test_empty_sides() -> None:
    none, some = torch.zeros(0, 4), torch.eye(4)
    no_keys, keys = torch.zeros(0, 1, dtype=torch.int64), torch.arange(4).unsqueeze(1)
    assert retrieval_ranks(none, some, no_keys, keys).tolist() == []
    assert retrieval_ranks(some, none, keys, no_keys).tolist() == [0, 0, 0, 0]
    metrics = pooled_metrics(some, none, keys, no_keys).image_to_text
    assert metrics.excluded == 4
    assert math.isnan(metrics.recall_at_1)


def test_memory_stays_below_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product of queries and candidates is larger than the chunk."""
    largest = 0
    multiply = torch.Tensor.__matmul__

    def watched(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        product = multiply(self, other)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    keys = torch.arange(500).unsqueeze(1)
    retrieval_ranks(torch.randn(500, 8), torch.randn(500, 8), keys, keys, chunk=4000)
    assert largest == 4000


def test_wrong_shapes_are_named() -> None:
    keys = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        retrieval_ranks(torch.zeros(3, 4), torch.zeros(3, 5), keys, keys)
    with pytest.raises(ValueError, match="one row per item"):
        retrieval_ranks(torch.zeros(2, 4), torch.zeros(3, 4), keys, keys)
