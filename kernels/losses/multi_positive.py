"""Losses with any number of positives, which ids name: InfoNCE in its several conventions, and the circle loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contrastive import LogSumExp, Paced, Reduction, SoftplusSum, TopK
from ..contrastive.arguments import factor
from ..distributed import Exchange, gather
from ..distributed.shards import all_numbers
from .base import check_scalar
from .batch import Ask, PairBatch, Side, View
from .directions import TwoDirectionLoss
from .log_domain import cross_entropy, log_add_exp, softplus
from .positives import ById, paired_ids, row_scores

#: Up to so many positives of an owner are kept from the sweep; for more it is cheaper to sweep again.
_MOST_KEPT = 64


class MultiPositiveLoss(TwoDirectionLoss):
    """InfoNCE with several positives: all pairs of equal ids (UniCL, arXiv:2204.03610, and its relatives).

    With S_ij = logit_scale <image_i, text_j>, P_i the texts that have the id of image i, and N_i all others, the term of
    image i is, by the options:

        positives="mean":    1/|P_i| sum_{k in P_i} -log(exp(S_ik) / Z_ik)
        positives="sum":             sum_{k in P_i} -log(exp(S_ik) / Z_ik)
        positives="inside":  -log(sum_{k in P_i} exp(S_ik) / Z_i)

        denominator="all":              Z_i  = sum_j exp(S_ij), all pairs of the row
        denominator="others_excluded":  Z_ik = exp(S_ik) + sum_{j in N_i} exp(S_ij), no other positive
        denominator="mil_nce":          Z_i  = the row's pairs, and sum_{l not of id k} exp(S_lk) for each k in P_i

    The term of a text is the same with S_ji, and each direction is a mean over its own owners, so that there may be more
    texts than images, or fewer. An owner without positives has the term 0 and gradient 0. In use:

        "mean", "all"       UniCL and Florence (arXiv:2111.11432), by the hash of a text; SupCon's L_out
                            (arXiv:2004.11362) between two modalities; fine-tuning with the texts of a class
        "sum", "all"        1-to-K: K texts of an image, one in each language ("Improving the Consistency in
                            Cross-Lingual Cross-Modal Retrieval with 1-to-K Contrastive Learning"). The released code
                            divides the sum of both directions by K; here "mean" divides each direction by its own count
        "inside", "mil_nce" MIL-NCE (arXiv:1912.06430): each positive is counted once, where released code
                            concatenates a row and its column and counts it twice

    With one positive for each owner, "all" and "others_excluded" are `ClipLoss`, as exact where pairs are well aligned.

    Args:
        positives: "mean", "sum" or "inside".
        denominator: "all", "others_excluded" (not with "inside") or "mil_nce". "others_excluded" asks the device how
            many positives an owner has at most; above 64, and under torch.compile, it takes a second sweep for each
            direction.
        options: direction_weights, rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.
            reduction="none" needs as many texts as images, or one direction alone.

    Raises:
        ValueError: unknown names, or options as in `ClipLoss`.
    """

    def __init__(self, *, positives: str = "mean", denominator: str = "all", **options: Any) -> None:
        super().__init__(**options)
        if positives not in ("mean", "sum", "inside"):
            raise ValueError(f'positives={positives!r}: expected "mean", "sum" or "inside"')
        if denominator not in ("all", "others_excluded", "mil_nce"):
            raise ValueError(f'denominator={denominator!r}: expected "all", "others_excluded" or "mil_nce"')
        if positives == "inside" and denominator == "others_excluded":
            raise ValueError(
                'positives="inside" has all positives in one fraction: with denominator="others_excluded" pass "mean" or '
                '"sum"'
            )
        self.positives = positives
        self.denominator = denominator

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch.

        Args:
            image_features: [n, D], normalised as the model defines it; any floating dtype.
            text_features: [m, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            output_dict: return {"contrastive_loss": loss}.
            image_ids: int64 [n], of one meaning on all ranks.
            text_ids: int64 [m]. Where image i belongs to text i one of the two serves both.

        Returns:
            A scalar in float32 (float64 for float64 features); [n] (or [m]) for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, or no ids.
        """
        check_scalar("logit_scale", logit_scale)
        batch = _batch_by_id(image_features, text_features, image_ids, text_ids, self._exchange())
        positives = [
            _Positives.of(batch, side, logit_scale, counted=self.denominator == "others_excluded") if weight else None
            for side, weight in enumerate(self.direction_weights)
        ]
        found = batch.reduce(scale=logit_scale, rows=self._ask(positives[0]), cols=self._ask(positives[1]))
        negatives = [results[0] if results else None for results in found]
        if self.denominator == "mil_nce":
            negatives = _of_rows_and_columns(negatives, positives, batch)
        terms: list[Tensor | None] = [None, None]
        for side, (mine, lse) in enumerate(zip(positives, negatives, strict=True)):
            if mine is None or lse is None:
                continue
            if self.denominator == "others_excluded":
                terms[side] = self._against_negatives(mine, lse, found[side][1:], batch, side, logit_scale)
            else:
                terms[side] = self._against_all(mine, lse, found[side][1])
        loss = self._combined(terms[0], terms[1], batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _ask(self, positives: _Positives | None) -> Ask | None:
        if positives is None:
            return _ask_of_negatives if self.denominator == "mil_nce" else None
        if self.denominator != "others_excluded":
            return _ask_of_all
        most = positives.most
        if 1 < most <= _MOST_KEPT:
            return lambda view: [LogSumExp(exclude=view.same), TopK(most, exclude=view.different)]
        return _ask_of_negatives

    def _against_all(self, mine: _Positives, negatives: Tensor, positives: Tensor) -> Tensor:
        """The owners' terms, from the log-sum-exps over their negatives and over their positives."""
        none, single = mine.counts == 0, mine.counts == 1
        # Of one positive the score that was rounded once, on which the gradient of a well aligned batch hangs.
        positives = torch.where(single, mine.total, positives).masked_fill(none, 0)
        terms = cross_entropy(negatives, positives)
        if self.positives != "inside":
            terms = terms + (positives - mine.total / mine.divisor).masked_fill(none | single, 0)
        if self.positives == "sum":
            terms = terms * mine.counts
        return terms.masked_fill(none, 0)

    def _against_negatives(
        self,
        mine: _Positives,
        negatives: Tensor,
        kept: tuple[Tensor, ...],
        batch: PairBatch,
        side: int,
        scale: float | Tensor,
    ) -> Tensor:
        """The owners' terms where each positive meets the negatives alone; `kept` is empty, or the positives' scores."""
        terms = cross_entropy(negatives, mine.total).masked_fill(mine.counts == 0, 0)
        if mine.most > 1:
            several = _over_kept(negatives, kept[0]) if kept else _in_second_sweep(negatives, batch, side, scale)
            terms = torch.where(mine.counts > 1, several, terms)
        return terms / mine.divisor if self.positives == "mean" else terms


class CircleLoss(TwoDirectionLoss):
    """The circle loss (arXiv:2002.10857) between images and texts, positives by id.

    The defaults are those with which DreamLIP (arXiv:2403.17007) takes an image to its many texts.

    With c_ij = <image_i, text_j>, a cosine, P_i the texts that have the id of image i and N_i all others, the term of
    image i is

        log(1 + sum_{j in N_i} exp(gamma a_ij (c_ij - m)) * sum_{k in P_i} exp(-gamma b_ik (c_ik - (1 - m)))),
        a_ij = [c_ij + m]_+,  b_ik = [1 + m - c_ik]_+, both without gradient,

    that of a text the same with c_ji, and each direction is a mean over its own owners. An owner without positives, or
    without negatives, has the term 0. There is no logit scale: gamma takes its place.

    Args:
        gamma: the scale.
        margin: m, the relaxation, in units of the cosine.
        options: direction_weights, rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.
            reduction="none" needs as many texts as images, or one direction alone.

    Raises:
        ValueError: a gamma that is not positive, or options as in `ClipLoss`.
    """

    def __init__(self, gamma: float = 32.0, margin: float = 0.25, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < gamma < math.inf or not math.isfinite(margin):
            raise ValueError(f"gamma={gamma!r}, margin={margin!r}: expected a positive number and a finite one")
        self.gamma = float(gamma)
        self.margin = float(margin)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch; arguments, results and errors as in `MultiPositiveLoss`, features unit vectors."""
        batch = _batch_by_id(image_features, text_features, image_ids, text_ids, self._exchange())
        rows, cols = (self._ask if weight else None for weight in self.direction_weights)
        found = batch.reduce(scale=1.0, rows=rows, cols=cols)
        terms = [softplus(results[0] + results[1]) if results else None for results in found]
        loss = self._combined(terms[0], terms[1], batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _ask(self, view: View) -> list[Reduction]:
        gamma, m = self.gamma, self.margin
        return [
            LogSumExp(exclude=view.same, of=Paced(gamma, 1, m, m)),
            LogSumExp(exclude=view.different, of=Paced(-gamma, -1, 1 + m, 1 - m)),
        ]


@dataclass(eq=False)
class _Positives:
    """The positives of one direction's owners, as far as no sweep is needed for it.

    Attributes:
        by_id: the owners' positives among all candidates.
        counts: int64 [n].
        total: [n], the sum of their scores, 0 where there is none.
        most: the most that an owner of any rank has, or more than that.
    """

    by_id: ById
    counts: Tensor
    total: Tensor
    most: int

    @classmethod
    def of(cls, batch: PairBatch, side: int, scale: float | Tensor, *, counted: bool) -> _Positives:
        """Of this rank's x (side 0) or y (side 1) among all ranks' candidates; `counted`: wait for the device."""
        owners, candidates = (batch.x, batch.y)[side], batch.whole[1 - side]
        assert owners.ids is not None
        assert candidates.ids is not None
        by_id = ById(owners.ids, candidates.ids)
        mine, others = owners.features, candidates.features
        dtype = torch.promote_types(torch.promote_types(mine.dtype, others.dtype), torch.float32)
        # The sum of an owner's scores is its score with the sum of its positives.
        total = row_scores(mine, by_id.sum(others.to(dtype)), factor(scale, "logit_scale", dtype, mine.device))
        counts = by_id.counts()
        # A traced graph cannot depend on a count. More than are kept is right for all.
        counted = counted and not torch.compiler.is_compiling()
        most = (int(counts.max()) if len(counts) else 0) if counted else _MOST_KEPT + 1
        if counted and batch.group is not None:
            # What is asked for depends on it, and every rank has to ask for the same.
            most = max(row[0] for row in all_numbers([most], batch.group, mine.device))
        return cls(by_id, counts, total, most)

    @property
    def divisor(self) -> Tensor:
        return self.counts.clamp(min=1)


def _batch_by_id(
    images: Tensor, texts: Tensor, image_ids: Tensor | None, text_ids: Tensor | None, exchange: Exchange | None
) -> PairBatch:
    of_images, of_texts = paired_ids(images, texts, image_ids, text_ids)
    return PairBatch(Side(images, of_images), Side(texts, of_texts), exchange)


def _ask_of_negatives(view: View) -> list[Reduction]:
    return [LogSumExp(exclude=view.same)]


def _ask_of_all(view: View) -> list[Reduction]:
    return [LogSumExp(exclude=view.same), LogSumExp(exclude=view.different)]


def _of_rows_and_columns(
    negatives: list[Tensor | None], positives: list[_Positives | None], batch: PairBatch
) -> list[Tensor | None]:
    """Log-sum-exps over the negatives of each owner and over those of all its positives."""
    of_rows, of_cols = negatives
    assert of_rows is not None
    assert of_cols is not None
    # On every rank, and in one order.
    _, (all_cols,) = gather(of_cols.unsqueeze(1), group=batch.group)
    _, (all_rows,) = gather(of_rows.unsqueeze(1), group=batch.group)
    joined: list[Tensor | None] = []
    for mine, own, of_others in ((positives[0], of_rows, all_cols), (positives[1], of_cols, all_rows)):
        joined.append(None if mine is None else log_add_exp(own, mine.by_id.log_sum_exp(of_others.squeeze(1))))
    return joined


def _over_kept(negatives: Tensor, scores: Tensor) -> Tensor:
    """sum_k softplus(negatives - scores_k), [n], over those of the scores [n, k] that are there."""
    missing = scores.isneginf()
    return softplus(negatives.unsqueeze(1) - scores.masked_fill(missing, 0)).masked_fill(missing, 0).sum(1)


def _in_second_sweep(negatives: Tensor, batch: PairBatch, side: int, scale: float | Tensor) -> Tensor:
    """The same sum, from the scores less their owner's negatives."""
    alone = negatives.isneginf()
    bias = -negatives.masked_fill(alone, 0)

    def ask(view: View) -> list[Reduction]:
        return [SoftplusSum(positive=view.same, exclude=view.different)]

    if side == 0:
        (sums,), _ = batch.reduce(scale=scale, rows=ask, row_bias=bias)
    else:
        _, (sums,) = batch.reduce(scale=scale, cols=ask, col_bias=bias)
    return sums.masked_fill(alone, 0)
