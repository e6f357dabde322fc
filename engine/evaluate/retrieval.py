"""Zero-shot retrieval metrics: ranks in blocks, several captions or images per id, ties counted against the model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..strict import StrictModel
from .measure import Measure
from .topk import SCORE_CHUNK, query_blocks

#: Scores closer than this, relative to the norms, are a tie. Two equal embeddings can differ by about 1e-7 in a
#: float32 product, depending on where in the matrix they stand; a tie must not be decided by that.
TIE_TOLERANCE = 1e-6


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


@torch.no_grad()
def retrieval_ranks(
    queries: Tensor,
    candidates: Tensor,
    query_keys: Tensor,
    candidate_keys: Tensor,
    *,
    chunk: int = SCORE_CHUNK,
) -> Tensor:
    """Rank of each query's best correct candidate, 1 for the first place.

    A candidate is correct when at least one key column of the two agrees and is not -1. The rank is
    ``1 + #{wrong candidates that score at least as high as the best correct one}``: ties count against the model, so
    that constant embeddings do not score 100%. Scores within 1e-6 of each other (relative to the norms) are ties.
    NaN never helps: a wrong candidate with a NaN score counts as ahead, and a query whose correct candidates all
    have NaN or infinite scores is lost, with rank M + 1.

    Args:
        queries: [N, D]; 16-bit inputs are multiplied in float32, float64 stays float64.
        candidates: [M, D].
        query_keys: int64 [N, K]; column 0 is the id, further columns are equivalences such as "same drawing".
        candidate_keys: int64 [M, K].
        chunk: scores held at once; memory is O(chunk + M), never N x M.

    Returns:
        int64 [N]; 0 for queries without any correct candidate.
    """
    _check_keys(queries, candidates, query_keys, candidate_keys)
    ranks = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    if len(candidates) == 0:
        return ranks
    dtype = torch.float64 if torch.float64 in (queries.dtype, candidates.dtype) else torch.float32
    candidates = candidates.to(dtype)
    norms = candidates.norm(dim=1)
    for block in query_blocks(len(queries), len(candidates), chunk):
        rows = queries[block].to(dtype)
        scores = rows @ candidates.T
        correct = _agreement(query_keys[block], candidate_keys)
        best, where = scores.masked_fill(~correct | scores.isnan(), -torch.inf).max(dim=1)
        tolerance = TIE_TOLERANCE * rows.norm(dim=1) * norms[where]
        # Written with "less than", so that a NaN on either side counts against the model.
        behind = scores < (best - tolerance).unsqueeze(1)
        rank = 1 + (~behind & ~correct).sum(dim=1)
        rank = rank.masked_fill(~best.isfinite(), len(candidates) + 1)
        ranks[block] = rank.masked_fill(~correct.any(dim=1), 0)
    return ranks


def rank_metrics(ranks: Tensor, candidates: int) -> RetrievalMetrics:
    """Recall at 1, 5, 10 and the median rank from the ranks of :func:`retrieval_ranks`."""
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


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    *,
    chunk: int = SCORE_CHUNK,
) -> RetrievalResult:
    """Recall at 1, 5, 10 and median rank, image to text and text to image.

    Several captions (or images) of one id are all correct; the best placed one counts. **Equal captions of different
    ids** are not correct for each other unless a key column says so: their embeddings are equal too, so they tie,
    ties count against the model, and an image whose only caption is shared so cannot reach rank 1.

    Args: as in :func:`retrieval_ranks`, with image_features [N, D] and text_features [M, D].
    """
    to_text = retrieval_ranks(image_features, text_features, image_keys, text_keys, chunk=chunk)
    to_image = retrieval_ranks(text_features, image_features, text_keys, image_keys, chunk=chunk)
    return RetrievalResult(
        image_to_text=rank_metrics(to_text, len(text_features)),
        text_to_image=rank_metrics(to_image, len(image_features)),
    )


def _agreement(query_keys: Tensor, candidate_keys: Tensor) -> Tensor:
    """bool [n, M]: some key column agrees and is not -1. One column at a time: no [n, M, K] in memory."""
    correct = torch.zeros(len(query_keys), len(candidate_keys), dtype=torch.bool, device=query_keys.device)
    for query_column, candidate_column in zip(query_keys.unbind(1), candidate_keys.unbind(1)):
        known = (query_column != -1).unsqueeze(1)
        correct |= (query_column.unsqueeze(1) == candidate_column) & known
    return correct


def _check_keys(queries: Tensor, candidates: Tensor, query_keys: Tensor, candidate_keys: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (queries, candidates, query_keys, candidate_keys)]
    two_dimensional = all(len(shape) == 2 for shape in shapes)
    if not two_dimensional or queries.shape[1] != candidates.shape[1] or query_keys.shape[1] != candidate_keys.shape[1]:
        raise ValueError(f"expected [N, D], [M, D], [N, K], [M, K], got {shapes}")
    if len(queries) != len(query_keys) or len(candidates) != len(candidate_keys):
        raise ValueError(f"embeddings and keys must have one row per item, got {shapes}")
