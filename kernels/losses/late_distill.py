"""Distillation of late interaction: a teacher's scores of each query's candidates."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive.arguments import described
from ..distributed import gather_counts, gather_ids
from ..late_interaction import MaxPooling, Pooling, maxsim
from ..late_interaction.pooling import check_pooling
from .base import check_scalar
from .score_terms import ScoredPairs, Sets, TokenLoss, check_sets

_FORMS = ("kl", "margin_mse")
_MAX = MaxPooling()


class LateDistillationLoss(TokenLoss):
    """A teacher's scores t of K candidates of each query, learnt by MaxSim (ColBERTv2, arXiv:2112.01488).

    With S_ik = logit_scale sum_{p in query i} max_{r in candidate ik} <p, r>, the term of query i is

        form="kl":          KL(softmax_k(t_ik / temperature) || softmax_k(S_ik / temperature))
        form="margin_mse":  mean_{k > 0} ((S_i0 - S_ik) - (t_i0 - t_ik))^2      (Margin-MSE, arXiv:2010.02666)

    and the loss is the mean over queries; in the second candidate 0 is the positive. PyLate's `Distillation` is the first
    with `min_max=True` (its default), which scales each query's S to 0..1 before; its teacher's scores are taken as they are.

    A candidate without a token that counts, or with a teacher's score of -inf, is left out of its query's sums. A query
    without a token, without two such candidates, or (for margin_mse) without its candidate 0, is dropped and counted in
    `dropped_pairs`. On several ranks nothing travels but the number of queries.

    Args:
        form: "kl" or "margin_mse".
        temperature: above 0, of both softmaxes; the term is not multiplied with its square.
        min_max: S_ik becomes (S_ik - min_k) / (max_k - min_k + 1e-8).
        normalize_scores: mean over a query's tokens that count, instead of the sum.
        pooling: of a query token's similarities with a candidate's, instead of the maximum.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError, TypeError: values out of their range, or options as in `ClipLoss`.
    """

    def __init__(
        self,
        form: str = "kl",
        temperature: float = 1.0,
        *,
        min_max: bool = False,
        normalize_scores: bool = False,
        pooling: Pooling = _MAX,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if form not in _FORMS:
            raise ValueError(f"form={form!r}: expected one of {', '.join(_FORMS)}")
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature!r}: expected a finite number above 0")
        check_pooling(pooling)
        self.form = form
        self.temperature = float(temperature)
        self.min_max = min_max
        self.normalize_scores = normalize_scores
        self.pooling = pooling

    def forward(
        self,
        query_tokens: Tensor,
        candidate_tokens: Tensor,
        teacher_scores: Tensor,
        logit_scale: float | Tensor = 1.0,
        query_mask: Tensor | None = None,
        candidate_mask: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch of queries.

        Args:
            query_tokens: [batch, Lq, D].
            candidate_tokens: [batch, K, Lc, D], K at least 2.
            teacher_scores: [batch, K]; no gradient goes to them.
            logit_scale: a factor of our scores, a float or a tensor of shape [] or [1].
            query_mask, candidate_mask: bool [batch, Lq] and [batch, K, Lc], True for tokens that count; None: all.
            output_dict: return {"distill_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 tokens); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes, dtypes, masks or devices that do not fit.
        """
        queries, candidates = Sets(query_tokens, query_mask), Sets(candidate_tokens, candidate_mask)
        check_sets(queries, "query_tokens")
        check_sets(candidates, "candidate_tokens", dims=4)
        check_scalar("logit_scale", logit_scale)
        shape = candidate_tokens.shape[:2]
        if shape[0] != query_tokens.shape[0] or shape[1] < 2:
            raise ValueError(
                f"candidate_tokens {list(candidate_tokens.shape)} with {query_tokens.shape[0]} queries: expected "
                f"[{query_tokens.shape[0]}, K, tokens, features] with K of at least 2"
            )
        if not isinstance(teacher_scores, Tensor) or teacher_scores.shape != shape:
            raise ValueError(f"teacher_scores is {described(teacher_scores)}: expected a tensor {list(shape)}")
        scores = maxsim(
            *(query_tokens, candidate_tokens, query_mask, candidate_mask),
            pooling=self.pooling,
            aggregate="mean" if self.normalize_scores else "sum",
        )
        teacher = teacher_scores.detach().to(scores.dtype)
        there = ~teacher.isneginf()
        if (present := candidates.present()) is not None:
            there = there & present
        counts = there.sum(1) > 1
        if (present := queries.present()) is not None:
            counts = counts & present
        if self.form == "margin_mse":
            counts = counts & there[:, 0]
        # Queries that are dropped compare nothing with nothing: numbers whose gradient is never asked for.
        there = there | ~counts[:, None]
        scores = scores.masked_fill(~(there & counts[:, None]), 0)
        scores = scores * (logit_scale.reshape(()).to(scores.dtype) if isinstance(logit_scale, Tensor) else logit_scale)
        terms = self._terms(scores, teacher.masked_fill(~(there & counts[:, None]), 0), there)
        loss = self._reduced(terms.masked_fill(~counts, 0), self._pairs(counts))
        return {"distill_loss": loss} if output_dict else loss

    def _terms(self, scores: Tensor, teacher: Tensor, there: Tensor) -> Tensor:
        if self.min_max:
            least = scores.masked_fill(~there, torch.inf).min(1, keepdim=True).values
            most = scores.masked_fill(~there, -torch.inf).max(1, keepdim=True).values
            scores = (scores - least) / (most - least + 1e-8)
        if self.form == "margin_mse":
            errors = (scores[:, :1] - scores[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
            counted = there[:, 1:]
            return errors.square().masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp(min=1)
        left_out = ~there
        ours, theirs = (
            F.log_softmax((each / self.temperature).masked_fill(left_out, -torch.inf), 1) for each in (scores, teacher)
        )
        return (theirs.exp() * (theirs - ours).masked_fill(left_out, 0)).sum(1)

    def _pairs(self, counts: Tensor) -> ScoredPairs:
        shards = gather_counts(len(counts), device=counts.device, group=self._group())
        counted = gather_ids(counts.to(torch.int64), shards).sum()
        return ScoredPairs(shards, 0, None, None, counted, shards.total - counted)
