"""Losses of late-interaction retrieval: queries against documents, each a set of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..distributed import Exchange, Shards, gather_counts
from ..late_interaction import MaxPooling, Pooling, maxsim
from ..late_interaction.pooling import check_pooling
from .base import check_scalar
from .blockwise import blockwise_sum
from .clip import checked_weights
from .log_domain import softplus
from .ring_scores import ring_scores
from .score_terms import ScoredPairs, Sets, TokenLoss, check_sets, col_terms, counted_pairs, row_terms, times

_MAX = MaxPooling()
_IN_BATCH = ("cross_entropy", "hardest")
_NEGATIVES = ("own", "all", "pairwise")


class ColbertLoss(TokenLoss):
    """Contrast of queries with documents by MaxSim scores, in the batch and against explicit negatives (ColBERT, arXiv:2004.12832).

    With s_ij = sum_{p in query i} max_{r in document j} <p, r>, divided by the query's number of tokens if
    `normalize_scores`, and S = logit_scale s / temperature, the term of query i is

        in_batch="cross_entropy":  T_i = softplus(log sum_{j != i} exp(S_ij) - S_ii) = -log softmax_j(S_i.)[i]
        in_batch="hardest":        T_i = softplus(max_{j != i} S_ij - S_ii)                  (ColPali, arXiv:2407.01449)

    and the loss is the mean over the batch. Explicit negatives, K documents n_ik of each query's own, take part as

        negatives="own":       further columns j of query i alone,
        negatives="all":       further columns of every query, those of all ranks too (PyLate's Contrastive),
        negatives="pairwise":  w T_i + (1 - w) mean_k softplus(S(i, n_ik) - S_ii), w = in_batch_weight.

    Nothing cancels where pairs are well aligned. A pair whose query or document has no token that counts takes no part: the
    loss is that of the batch without it and its negatives, and `dropped_pairs` counts such pairs. If all are dropped the
    mean is NaN. Negatives without a token are left out.

    Other packages' losses are settings of this one, but for padding, which colpali-engine leaves in the maximum as zero
    vectors. PyLate's `Contrastive` is negatives="all". colpali-engine's have normalize_scores=True and temperatures of their own, 0.02
    or 1: its `ColbertLoss` is ours, `ColbertPairwiseCELoss` in_batch="hardest", and `ColbertNegativeCELoss` and
    `ColbertPairwiseNegativeCELoss` are these two with negatives="pairwise", in_batch_weight=0.5. Its smooth maximum is
    `pooling=LogSumExpPooling(tau)`. Its `ColbertSigmoidLoss` is `over_scores` of `SigLipLoss`, divided by the batch size.

    On several ranks each passes its own pairs, as in `ClipLoss`; documents' tokens travel, padded to the longest rank's.

    Args:
        temperature: above 0; divides the scores, beside the logit scale of a call.
        normalize_scores: mean over a query's tokens that count, instead of the sum.
        in_batch: "cross_entropy" or "hardest".
        negatives: "own", "all" or "pairwise"; of no effect in a call without negatives.
        in_batch_weight: w, from 0 to 1. At 0 a call with pairwise negatives scores no other documents.
        direction_weights: (query to document, document to query). The second contrasts a document with all queries.
        pooling: of a query token's similarities with a document's, instead of the maximum.
        negative_filter: (threshold, factor) or None: in-batch documents that score above threshold times the own one may be
            answers too, and their scores are multiplied with the factor (colpali-engine has (0.95, 0.5)). Of queries alone.
        query_block: None, or how many queries are scored at a time: the matrix of scores then never exists as a whole, and
            neither does its gradient, at no more computation. Needs direction_weights=(w, 0) and a reduction.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`; reduction="none" gives 0 for
            dropped pairs.

    Raises:
        ValueError, TypeError: values out of their range, or options as in `ClipLoss`.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        normalize_scores: bool = False,
        *,
        in_batch: str = "cross_entropy",
        negatives: str = "own",
        in_batch_weight: float = 0.5,
        direction_weights: tuple[float, float] = (1.0, 0.0),
        pooling: Pooling = _MAX,
        negative_filter: tuple[float, float] | None = None,
        query_block: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature!r}: expected a finite number above 0")
        for name, value, known in (("in_batch", in_batch, _IN_BATCH), ("negatives", negatives, _NEGATIVES)):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
        if not 0 <= in_batch_weight <= 1:
            raise ValueError(f"in_batch_weight={in_batch_weight!r}: expected a number from 0 to 1")
        check_pooling(pooling)
        if negative_filter is not None and (not isinstance(negative_filter, tuple) or len(negative_filter) != 2):
            raise ValueError(f"negative_filter={negative_filter!r}: expected (threshold, factor) or None")
        self.temperature = float(temperature)
        self.normalize_scores = normalize_scores
        self.hardest = in_batch == "hardest"
        self.negatives = negatives
        self.in_batch_weight = float(in_batch_weight)
        self.direction_weights = checked_weights(direction_weights)
        self.pooling = pooling
        self.negative_filter = negative_filter
        self.query_block = query_block
        if query_block is not None:
            self._check_block(query_block)

    def _check_block(self, block: int) -> None:
        if not isinstance(block, int) or block < 1:
            raise ValueError(f"query_block={block!r}: expected a whole number of at least 1, or None")
        if self.direction_weights[1] or self.reduction == "none":
            raise ValueError(
                f"query_block={block} with direction_weights={self.direction_weights}, reduction={self.reduction!r}: in "
                'blocks there is the direction of queries alone, direction_weights=(1.0, 0.0), as "mean" or "sum"'
            )
        if self.strategy == "ring":
            raise ValueError(
                f'query_block={block} with strategy="ring", which scores one rank\'s documents at a time: leave one out'
            )

    def forward(
        self,
        query_tokens: Tensor,
        document_tokens: Tensor,
        logit_scale: float | Tensor = 1.0,
        query_mask: Tensor | None = None,
        document_mask: Tensor | None = None,
        output_dict: bool = False,
        *,
        negative_tokens: Tensor | None = None,
        negative_mask: Tensor | None = None,
        start: int = 0,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: query i belongs to document i.

        Args:
            query_tokens: [batch, Lq, D], unit vectors where similarities are to be cosines; any floating dtype.
            document_tokens: [batch, Ld, D]; on one process [M, Ld, D] with M >= batch too, the others being negatives.
            logit_scale: a factor of the scores, a float or a tensor of shape [] or [1].
            query_mask, document_mask: bool [batch, Lq] and [batch, Ld], True for tokens that count; None: all.
            output_dict: return {"contrastive_loss": loss}.
            negative_tokens: [batch, K, Ln, D], documents that do not answer their query. On several ranks all pass them or none.
            negative_mask: bool [batch, K, Ln].
            start: position of query 0's document; on several ranks 0.

        Returns:
            A scalar in float32 (float64 for float64 tokens); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes, dtypes, masks or devices that do not fit.
        """
        exchange = self._exchange()
        group = None if exchange is None else exchange.group
        queries, documents = Sets(query_tokens, query_mask), Sets(document_tokens, document_mask)
        _check(queries, documents, start, on_one_rank=group is None)
        check_scalar("logit_scale", logit_scale)
        negatives = None if negative_tokens is None else Sets(negative_tokens, negative_mask)
        if negatives is not None:
            _check_negatives(negatives, query_tokens.shape[0])
        rings = exchange is not None and exchange.strategy == "ring"
        if exchange is None:
            shards = Shards((query_tokens.shape[0],))
        elif rings:
            shards = gather_counts(query_tokens.shape[0], device=query_tokens.device, group=group)
        else:
            shards, documents = documents.gathered(exchange)
        pairs = counted_pairs(queries, documents, shards, start + shards.start, travelling=rings)
        if negatives is not None and self.negatives == "all":
            negatives = negatives.only(pairs.rows).flattened()
            if not rings:
                _, negatives = negatives.gathered(exchange)
        if self.query_block:
            terms = self._in_blocks(pairs, queries, documents, negatives, logit_scale)
        else:
            terms = self._terms(pairs, queries, documents, negatives, logit_scale, exchange if rings else None)
        loss = self._reduced(terms, pairs)
        return {"contrastive_loss": loss} if output_dict else loss

    def _terms(
        self,
        pairs: ScoredPairs,
        queries: Sets,
        documents: Sets,
        negatives: Sets | None,
        scale: float | Tensor,
        exchange: Exchange | None = None,
    ) -> Tensor:
        """[n] of these queries; with an exchange the documents are this rank's and travel."""
        scale = scale / self.temperature
        extra = None if negatives is None else self._of_negatives(queries, negatives, scale, exchange)
        pairwise = self.negatives == "pairwise" and extra is not None
        of_queries, of_documents = self.direction_weights
        if pairwise and not self.in_batch_weight and not of_documents:
            start = 0 if exchange is not None else pairs.start
            own = documents.rows(start, start + len(queries.tokens))
            scores = self._scores(queries, Sets(own.tokens[:, None], None if own.mask is None else own.mask[:, None]))
            own_scores = times(pairs.only_counted(scores[:, 0]), scale)
            return of_queries * pairs.only_counted(_pairwise(extra, own_scores))
        scaled = pairs.scaled(self._across(queries, documents, exchange), scale)
        of_rows = scaled if self.negative_filter is None else _filtered(scaled, pairs, *self.negative_filter)
        terms = row_terms(of_rows, pairs, None if pairwise else extra, hardest=self.hardest)
        if pairwise:
            of_negatives = pairs.only_counted(_pairwise(extra, pairs.own(scaled)))
            terms = self.in_batch_weight * terms + (1 - self.in_batch_weight) * of_negatives
        terms = of_queries * terms
        if of_documents:
            terms = terms + of_documents * col_terms(scaled, pairs, hardest=self.hardest)
        return terms

    def _in_blocks(
        self, pairs: ScoredPairs, queries: Sets, documents: Sets, negatives: Sets | None, scale: float | Tensor
    ) -> Tensor:
        """The terms' sum."""
        given = scale if isinstance(scale, Tensor) else None
        of_all = negatives is not None and self.negatives == "all"
        nothing = None, None

        def total(rows: slice, *tensors: Any) -> Tensor:
            q, q_mask, n, n_mask, d, d_mask, all_n, all_mask, factor = tensors
            found = Sets(all_n, all_mask) if of_all else Sets(n, n_mask) if n is not None else None
            block = Sets(q, q_mask), Sets(d, d_mask), found
            return self._terms(pairs.block(rows), *block, scale if factor is None else factor).sum()

        by_row = *queries, *(negatives if negatives is not None and not of_all else nothing)
        whole = *documents, *(negatives if negatives is not None and of_all else nothing), given
        assert self.query_block is not None
        summed: Tensor = blockwise_sum(total, by_row, whole, self.query_block)
        return summed

    def _of_negatives(self, queries: Sets, negatives: Sets, scale: float | Tensor, exchange: Exchange | None) -> Tensor:
        if exchange is None or self.negatives != "all":
            return _scaled(self._scores(queries, negatives), negatives.present(), scale)
        return _scaled(self._across(queries, negatives, exchange), negatives.present_on_all(exchange.group), scale)

    def _across(self, queries: Sets, documents: Sets, exchange: Exchange | None) -> Tensor:
        if exchange is None:
            return self._scores(queries, documents)
        (scores,) = ring_scores(lambda q, d: [self._scores(q, d)], queries, documents, exchange)
        return scores

    def _scores(self, queries: Sets, documents: Sets) -> Tensor:
        return maxsim(
            queries.tokens,
            documents.tokens,
            queries.mask,
            documents.mask,
            pooling=self.pooling,
            aggregate="mean" if self.normalize_scores else "sum",
        )


def _scaled(scores: Tensor, present: Tensor | None, scale: float | Tensor) -> Tensor:
    """scale * scores [n, K], -inf for documents without a token, which give no gradient to the scale either."""
    if present is None:
        return times(scores, scale)
    return times(scores.masked_fill(~present, 0), scale).masked_fill(~present, -torch.inf)


def _filtered(scaled: Tensor, pairs: ScoredPairs, threshold: float, factor: float) -> Tensor:
    """Scores [n, M] with those above threshold * own multiplied by the factor, the own ones as they are."""
    own = pairs.own(scaled).detach()[:, None]
    likely = (scaled.detach() > threshold * own) & ~pairs.own_columns(scaled)
    return torch.where(likely, factor * scaled, scaled)


def _pairwise(negatives: Tensor | None, own: Tensor) -> Tensor:
    """[n]: the mean of softplus(negative - own) over the negatives [n, K] that are there; 0 where none is."""
    assert negatives is not None
    counted = (~negatives.isneginf()).sum(1).clamp(min=1)
    return softplus(negatives - own[:, None]).sum(1) / counted


def _check(queries: Sets, documents: Sets, start: int, *, on_one_rank: bool) -> None:
    check_sets(queries, "query_tokens")
    check_sets(documents, "document_tokens")
    n, m = queries.tokens.shape[0], documents.tokens.shape[0]
    if not on_one_rank and (start or n != m):
        raise ValueError(
            f"start={start} with {n} queries and {m} documents on one of several ranks: expected 0, and as many documents "
            "as queries, since those of the other ranks are gathered"
        )
    if not 0 <= start <= m - n:
        raise ValueError(
            f"start={start} with {n} queries and {m} documents: expected a document of each query from there"
        )


def _check_negatives(negatives: Sets, queries: int) -> None:
    check_sets(negatives, "negative_tokens", dims=4)
    shape = list(negatives.tokens.shape)
    if shape[0] != queries or not shape[1]:
        raise ValueError(
            f"negative_tokens {shape} with {queries} queries: expected [{queries}, K, tokens, features], K > 0"
        )
