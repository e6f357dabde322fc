"""Zero-shot retrieval metrics: ranks in blocks, several captions or images per id, ties counted against the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..strict import StrictModel
from .measure import Measure
from .scorers import PooledScorer, Scorer, Scoring, Side
from .topk import SCORE_CHUNK, query_blocks


class RetrievalMetrics(StrictModel):
    """One direction of retrieval. Recalls are fractions in [0, 1], NaN when no query could be asked."""

    recall_at_1: Measure
    recall_at_5: Measure
    recall_at_10: Measure
    median_rank: Measure
    queries: int
    candidates: int
    #: Queries without any correct candidate. They are no part of the figures above.
    excluded: int


class RetrievalResult(StrictModel):
    """Both directions."""

    image_to_text: RetrievalMetrics
    text_to_image: RetrievalMetrics


class Keys(NamedTuple):
    """What counts as correct: column 0 is the id, further columns are equivalences such as "same drawing".

    Attributes:
        queries: int64 [N, K].
        candidates: int64 [M, K].
    """

    queries: Tensor
    candidates: Tensor


def retrieval_ranks(
    queries: Tensor,
    candidates: Tensor,
    query_keys: Tensor,
    candidate_keys: Tensor,
    *,
    chunk: int = SCORE_CHUNK,
) -> Tensor:
    """:func:`ranks_by` of the dot products of queries [N, D] and candidates [M, D], with one set of keys."""
    return ranks_by(PooledScorer(queries, candidates), [Keys(query_keys, candidate_keys)], chunk=chunk)[0]


@torch.no_grad()
def ranks_by(scorer: Scorer, keys: Sequence[Keys], *, chunk: int = SCORE_CHUNK) -> list[Tensor]:
    """Rank of each query's best correct candidate, 1 for the first place, for each of several ideas of correct.

    A candidate is correct when at least one key column of the two agrees and is not -1. The rank is
    ``1 + #{wrong candidates that score at least as high as the best correct one}``: ties count against the model, so
    that constant embeddings do not score 100%. Scores within 1e-6 of each other (relative to the norms) are ties.
    NaN never helps: a wrong candidate with a NaN score counts as ahead, and a query whose correct candidates all
    have NaN or infinite scores is lost, with rank M + 1.

    Args:
        scorer: of N queries and M candidates.
        keys: on the device of the scores, which are computed once for all of them.
        chunk: scores held at once; memory is O(chunk + M), never N x M.

    Returns:
        int64 [N] for each of ``keys``; 0 for queries without any correct candidate.
    """
    for each in keys:
        _check_keys(scorer, each)
    ranks = [torch.zeros(scorer.queries, dtype=torch.int64, device=each.queries.device) for each in keys]
    if scorer.candidates == 0:
        return ranks
    for block in query_blocks(scorer.queries, scorer.candidates, chunk):
        scores = scorer.scores(block)
        for each, found in zip(keys, ranks):
            correct = _agreement(each.queries[block], each.candidates)
            best, where = scores.masked_fill(~correct | scores.isnan(), -torch.inf).max(dim=1)
            # Written with "less than", so that a NaN on either side counts against the model.
            behind = scores < (best - scorer.tolerance(block, where)).unsqueeze(1)
            rank = 1 + (~behind & ~correct).sum(dim=1)
            rank = rank.masked_fill(~best.isfinite(), scorer.candidates + 1)
            found[block] = rank.masked_fill(~correct.any(dim=1), 0)
    return ranks


def rank_metrics(ranks: Tensor, candidates: int) -> RetrievalMetrics:
    """Recall at 1, 5, 10 and the median rank from the ranks of :func:`ranks_by`."""
    asked = ranks[ranks > 0]
    found = asked <= candidates

    def recall(k: int) -> float:
        return float(((asked <= k) & found).double().mean())

    ordered = asked.sort().values.double()
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    return RetrievalMetrics(
        recall_at_1=recall(1),
        recall_at_5=recall(5),
        recall_at_10=recall(10),
        median_rank=float(middle.mean()),
        queries=len(asked),
        candidates=candidates,
        excluded=len(ranks) - len(asked),
    )


def retrieval_metrics(images: Side, texts: Side, keys: Sequence[Keys], scoring: Scoring) -> list[RetrievalResult]:
    """Recall at 1, 5, 10 and median rank, image to text and text to image, for each of several ideas of correct.

    Several captions (or images) of one id are all correct; the best placed one counts. **Equal captions of different
    ids** are not correct for each other unless a key column says so: their embeddings are equal too, so they tie,
    ties count against the model, and an image whose only caption is shared so cannot reach rank 1.

    Args:
        images: N images. texts: M texts.
        keys: of the images as queries [N, K] and the texts as candidates [M, K].
        scoring: which scores rank.
    """
    turned = [Keys(each.candidates, each.queries) for each in keys]
    to_text = ranks_by(scoring.scorer(images, texts), keys, chunk=scoring.chunk)
    to_image = ranks_by(scoring.scorer(texts, images), turned, chunk=scoring.chunk)
    return [
        RetrievalResult(
            image_to_text=rank_metrics(of_images, len(texts)), text_to_image=rank_metrics(of_texts, len(images))
        )
        for of_images, of_texts in zip(to_text, to_image)
    ]


def _agreement(query_keys: Tensor, candidate_keys: Tensor) -> Tensor:
    """bool [n, M]: some key column agrees and is not -1. One column at a time: no [n, M, K] in memory."""
    correct = torch.zeros(len(query_keys), len(candidate_keys), dtype=torch.bool, device=query_keys.device)
    for query_column, candidate_column in zip(query_keys.unbind(1), candidate_keys.unbind(1)):
        known = (query_column != -1).unsqueeze(1)
        correct |= (query_column.unsqueeze(1) == candidate_column) & known
    return correct


def _check_keys(scorer: Scorer, keys: Keys) -> None:
    shapes = [tuple(each.shape) for each in keys]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"expected keys [N, K] and [M, K], got {shapes}")
    if (shapes[0][0], shapes[1][0]) != (scorer.queries, scorer.candidates):
        raise ValueError(
            f"embeddings and keys must have one row per item, got keys {shapes} for {scorer.queries} queries and "
            f"{scorer.candidates} candidates"
        )
