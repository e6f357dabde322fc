"""Retrieval and classification by late interaction against dense sums of maxima."""

from types import ModuleType
from typing import Any

import pytest
import torch

from pairtile.engine.evaluate import (
    Keys,
    PackedTokens,
    PooledScorer,
    RerankScorer,
    Scoring,
    Side,
    TokenScorer,
    embed_split,
    make_encoder,
    retrieval_metrics,
    scorers,
)


def token_side(count: int, longest: int, generator: torch.Generator) -> tuple[Side, list[torch.Tensor]]:
    """Sides of 1 to ``longest`` unit tokens each, and the same as a list of [l, 6]."""
    sets = []
    for _ in range(count):
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        sets.append(torch.nn.functional.normalize(torch.randn(length, 6, generator=generator), dim=1))
    lengths = torch.tensor([len(each) for each in sets])
    pooled = torch.nn.functional.normalize(torch.stack([each.mean(0) for each in sets]), dim=1)
    return Side(pooled, PackedTokens.of_lengths(torch.cat(sets), lengths)), sets


def dense(queries: list[torch.Tensor], candidates: list[torch.Tensor]) -> torch.Tensor:
    """FILIP's similarity, pair by pair: the mean over a query's tokens of their maxima."""
    with torch.no_grad():
        return torch.tensor([[float((q.double() @ d.double().T).amax(1).mean()) for d in candidates] for q in queries])


@pytest.fixture
def sides() -> tuple[Side, list[torch.Tensor], Side, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return (*token_side(23, 7, generator), *token_side(31, 4, generator))


@pytest.mark.parametrize("block", [1, 100, 2**24])
def test_scores_equal_the_dense_ones_whatever_the_blocks(
    sides: Any, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    images, image_sets, texts, text_sets = sides
    monkeypatch.setattr(scorers, "TOKEN_BLOCK", block)
    expected = dense(image_sets, text_sets)
    scorer = TokenScorer(images.tokens, texts.tokens, "cpu")
    # sums of 6 products of unit vectors, in float32
    torch.testing.assert_close(scorer.scores(slice(3, 20)), expected[3:20], rtol=0, atol=5e-7)
    rerank = RerankScorer(PooledScorer(images.pooled, texts.pooled), images.tokens, texts.tokens, top=8, device="cpu")
    pooled = images.pooled @ texts.pooled.T
    first = pooled.topk(8, dim=1).indices
    found = rerank.scores(slice(0, 23))
    torch.testing.assert_close(found.gather(1, first), expected.gather(1, first), rtol=0, atol=5e-7)
    for row in range(23):
        others = [column for column in pooled[row].argsort(descending=True).tolist() if column not in first[row]]
        assert found[row].argsort(descending=True).tolist()[8:] == others


def test_selecting_and_padding_keep_what_belongs_to_each(sides: Any) -> None:
    images, image_sets, _, _ = sides
    chosen = images.tokens.select(torch.tensor([5, 2, 5, 22]))
    tokens, mask = chosen.padded()
    for row, item in enumerate([5, 2, 5, 22]):
        assert torch.equal(tokens[row][mask[row]], image_sets[item])
    again = PackedTokens.of_padded(tokens, mask)
    assert torch.equal(again.rows, chosen.rows)
    assert torch.equal(again.cu_seqlens, chosen.cu_seqlens)
    nothing = chosen.select(torch.zeros(0, dtype=torch.int64))
    assert (len(nothing), nothing.padded()[0].shape) == (0, (0, 0, 6))


def test_the_two_directions_use_the_two_matrices(sides: Any) -> None:
    images, image_sets, texts, text_sets = sides
    keys = Keys(torch.arange(23).unsqueeze(1), torch.arange(31).unsqueeze(1))

    def recall(scores: torch.Tensor, k: int) -> float:
        """Of the queries that have a partner, which is the one at their own place."""
        asked = scores[: min(scores.shape)]
        own = asked.diagonal().unsqueeze(1)
        return float(((asked >= own).sum(1) <= k).double().mean())

    (late,) = retrieval_metrics(images, texts, [keys], Scoring("tokens", chunk=50))
    assert late.image_to_text.recall_at_5 == pytest.approx(recall(dense(image_sets, text_sets), 5))
    assert late.text_to_image.recall_at_5 == pytest.approx(recall(dense(text_sets, image_sets), 5))
    (all_again,) = retrieval_metrics(images, texts, [keys], Scoring("rerank", top=31, chunk=50))
    assert all_again == late
    (one,) = retrieval_metrics(images, texts, [keys], Scoring("rerank", top=1))
    (pooled,) = retrieval_metrics(images, texts, [keys], Scoring())
    assert one == pooled != late


def test_a_split_by_late_interaction(fake: ModuleType) -> None:
    split = fake.FakeSplit()
    model = fake.FakeModel()
    found = embed_split(make_encoder(model, split, batch_size=5, device="cpu", tokens=True), split)
    image_sets = [found.image_tokens.slice(slice(i, i + 1)).rows for i in range(len(found.keys))]
    text_sets = [found.text_tokens.slice(slice(i, i + 1)).rows for i in range(len(found.texts))]
    assert [len(each) for each in text_sets] == [min(len(text), 12) for text in found.texts]

    result = fake.evaluate_fake(model, 43, scores="tokens", match_ids=())
    scores = dense(text_sets, image_sets)
    ranks = []
    for row, text_id in zip(scores, found.text_ids):
        right = found.image_ids == text_id
        ranks.append(1 + int((row[~right] >= row[right].max() - 1e-6).sum()))
    metrics = result.retrieval.text_to_image
    assert metrics.recall_at_5 == pytest.approx(sum(rank <= 5 for rank in ranks) / len(ranks))
    assert metrics.median_rank == pytest.approx(torch.tensor(ranks).double().quantile(0.5).item())
    assert (result.scores, result.rerank_top) == ("tokens", None)

    # a class scores the mean of its prompts' scores
    prompts = ["a round thing", "round", "a flat thing", "flat", "a level thing", "level", "a long thing", "long"]
    tokens = split.tokenizer.encode(prompts, 12)
    prompt_sets = [words[mask] for words, mask in zip(*model.eval().embed_text(*tokens)[1])]
    per_prompt = dense(image_sets, prompt_sets)
    per_class = torch.stack([per_prompt[:, :2].mean(1), per_prompt[:, 2:6].mean(1), per_prompt[:, 6:].mean(1)], dim=1)
    guessed = [("round", "flat", "long")[best] for best in per_class.argmax(1).tolist()]
    pairs = [(guess, label) for guess, label in zip(guessed, found.labels["kind"]) if label is not None]
    assert result.classification.top1 == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_pooled_sides_cannot_be_scored_by_tokens(sides: Any) -> None:
    images = Side(sides[0].pooled)
    with pytest.raises(ValueError, match="need token embeddings"):
        Scoring("tokens").scorer(images, images)
