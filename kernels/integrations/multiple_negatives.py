"""The multiple negatives ranking loss on embeddings, with every option of sentence-transformers, in O(batch) memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive import Diagonal, LogSumExp, PairScore, Reduction, SameId, similarity_reduce
from ..contrastive.sums import cross_entropy_sum

#: What competes with a pair, and how it is summed up, by the names that sentence-transformers gives them.
DIRECTIONS = frozenset({"query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"})
PARTITION_MODES = frozenset({"joint", "per_direction"})
HARDNESS_MODES = frozenset({None, "in_batch_negatives", "hard_negatives", "all_negatives"})


@dataclass(frozen=True)
class RankingOptions:
    """The options of sentence-transformers' `MultipleNegativesRankingLoss`, under its names.

    Attributes:
        scale: factor of the similarities, the inverse of a temperature; a tensor of shape [] or [1] gets its gradient,
            unless a hardness is asked for too.
        directions: of `DIRECTIONS`, "query_to_doc" among them.
        partition_mode: "joint": one softmax over all directions; "per_direction": the mean of one softmax for each.
        hardness_mode: which negatives of a query are made harder: None, or one of `HARDNESS_MODES`.
        hardness_strength: alpha, what is added to the scale of those negatives, without gradient.
    """

    scale: float | Tensor = 20.0
    directions: frozenset[str] = frozenset({"query_to_doc"})
    partition_mode: str = "joint"
    hardness_mode: str | None = None
    hardness_strength: float = 0.0

    @property
    def harder_in_batch(self) -> bool:
        """Whether the documents of other queries are made harder."""
        return self.hardness_strength > 0 and self.hardness_mode in ("in_batch_negatives", "all_negatives")

    @property
    def harder_own(self) -> bool:
        """Whether a query's own hard negatives are made harder."""
        return self.hardness_strength > 0 and self.hardness_mode in ("hard_negatives", "all_negatives")


def multiple_negatives_ranking(
    queries: Tensor,
    documents: Sequence[Tensor],
    options: RankingOptions,
    *,
    all_queries: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """Mean over this rank's queries of -log of the share that a query's own document has of its softmax.

    With S_ij = scale <q_i, d_j> and one direction this is the InfoNCE loss (arXiv:1807.03748) over all positives and
    hard negatives of the batch; with the four of them jointly that of GTE (arXiv:2308.03281),

        log(sum over the candidates of all directions of exp S) - S_ii.

    It is computed as softplus(LSE over the others - S_ii), which does not cancel when pairs are well aligned.
    "doc_to_query" has the pair (i, i) among its candidates too; counted c times in all, it gives
    log c + softplus(LSE over the others - S_ii - log c). A hardness alpha (arXiv:2503.04812) turns S of the negatives
    it names into S + alpha stop_gradient(<q_i, d_j>).

    Args:
        queries: [n, D], this rank's, normalised if the similarity is the cosine; any floating dtype.
        documents: 1 + K tensors [N, D]: the positives of all N queries of all ranks, then their hard negatives, row i of
            each belonging to query i.
        options: what the softmax is made of.
        all_queries: [N, D], of all ranks; None on one rank.
        start: position of this rank's first query among all.

    Returns:
        A scalar in float32 (float64 for float64 embeddings), differentiable in all embeddings and in `options.scale`.

    Raises:
        ValueError, TypeError: as `similarity_reduce`.
    """
    batch = _Batch(queries, documents, queries if all_queries is None else all_queries, start)
    harder = options.harder_in_batch or options.harder_own
    if not harder and (options.directions == {"query_to_doc"} or options.partition_mode == "per_direction"):
        return _mean_cross_entropy(batch, options)
    return _mean_over_competitors(batch, options)


class _Batch:
    """This rank's pairs, and all that they compete with."""

    def __init__(self, queries: Tensor, documents: Sequence[Tensor], all_queries: Tensor, start: int) -> None:
        self.size, self.total, self.negatives = queries.shape[0], documents[0].shape[0], len(documents) - 1
        self.start, self.pair = start, Diagonal(start)
        self.queries, self.all_queries = queries, all_queries
        self.positives = documents[0][start : start + self.size]
        # torch.cat copies a single tensor too
        self.all_documents = torch.cat(list(documents)) if self.negatives else documents[0]

    @property
    def on_one_rank(self) -> bool:
        return self.size == self.total

    def own_documents(self) -> Diagonal | SameId:
        """The positive and the hard negatives of each query, among all documents."""
        if not self.negatives:
            return self.pair
        queries = torch.arange(self.total, device=self.queries.device)
        return SameId(queries[self.start : self.start + self.size], queries.repeat(1 + self.negatives))

    def own_negatives(self) -> list[PairScore]:
        """The scores of each query with its own hard negatives."""
        return [PairScore(Diagonal(self.start + k * self.total)) for k in range(1, 1 + self.negatives)]


def _mean_cross_entropy(batch: _Batch, options: RankingOptions) -> Tensor:
    """Queries against all documents, and documents against all queries if asked for: cross-entropies of S alone."""
    both = "doc_to_query" in options.directions
    weight = 1 / (max(1, batch.size) * (2 if both else 1))
    queries, documents, scale = batch.queries, batch.all_documents, options.scale
    if both and batch.on_one_rank:  # hard negatives are columns without a pair, whose own terms are 0
        return cross_entropy_sum(queries, documents, scale=scale, row_weight=weight, col_weight=weight)
    loss = cross_entropy_sum(queries, documents, scale=scale, pair=batch.pair, row_weight=weight)
    if both:
        reverse = (batch.positives, batch.all_queries)
        loss = loss + cross_entropy_sum(*reverse, scale=scale, pair=batch.pair, row_weight=weight)
    return loss


def _mean_over_competitors(batch: _Batch, options: RankingOptions) -> Tensor:
    own, competitors = _against_documents(batch, options)
    if "query_to_query" in options.directions:
        competitors.append(_log_sum_exp(batch.queries, batch.all_queries, options, batch.pair))
    if "doc_to_doc" in options.directions:
        competitors.append(_log_sum_exp(batch.positives, batch.all_documents, options, batch.own_documents()))
    if options.partition_mode == "joint":
        copies = math.log(2 if "doc_to_query" in options.directions else 1)
        return copies + _cross_entropy(torch.stack(competitors).logsumexp(0), own + copies).mean()
    return torch.stack([_cross_entropy(others, own) for others in competitors]).mean()


def _against_documents(batch: _Batch, options: RankingOptions) -> tuple[Tensor, list[Tensor]]:
    """Each query's own score, and the LSE of its negatives; then, if asked for, that of its document's."""
    harder = options.harder_in_batch
    scale = options.scale + options.hardness_strength if harder else options.scale
    # Hard negatives of another hardness than the rest are few: one score each, beside the sweep.
    apart = batch.negatives > 0 and harder != options.harder_own
    rows: list[Reduction] = [
        PairScore(batch.pair),
        LogSumExp(exclude=batch.own_documents() if apart else batch.pair),
        *(batch.own_negatives() if apart else []),
    ]
    backwards = "doc_to_query" in options.directions
    in_one_sweep = backwards and batch.on_one_rank and not harder
    (own, others, *hard), of_documents = similarity_reduce(
        batch.queries,
        batch.all_documents,
        scale=scale,
        rows=rows,
        cols=[LogSumExp(exclude=batch.pair)] if in_one_sweep else [],
    )
    if harder:
        share = options.scale / scale
        own, hard = share * own, [share * each for each in hard]
        # the value at the harder scale, the gradient at the scale itself
        others = share * others + (1 - share) * others.detach()
    if apart:
        if options.harder_own:
            hard = [each + options.hardness_strength / options.scale * each.detach() for each in hard]
        others = torch.stack([others, *hard]).logsumexp(0)
    if not backwards:
        return own, [others]
    if in_one_sweep:
        return own, [others, of_documents[0][: batch.size]]
    return own, [others, _log_sum_exp(batch.positives, batch.all_queries, options, batch.pair)]


def _log_sum_exp(x: Tensor, y: Tensor, options: RankingOptions, exclude: Diagonal | SameId) -> Tensor:
    (result,), _ = similarity_reduce(x, y, scale=options.scale, rows=[LogSumExp(exclude=exclude)])
    return result


def _cross_entropy(others: Tensor, own: Tensor) -> Tensor:
    # The last term is 0, or NaN where the own score is infinite: softplus(-inf) = 0 would hide that.
    return -F.logsigmoid(own - others) + 0 * own
