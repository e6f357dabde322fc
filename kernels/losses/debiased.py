"""Losses that correct for negatives that are positives in truth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..contrastive import LogSumExp, Paced, PairScore, Reduction
from ..contrastive.arguments import factor
from .base import check_pairs, check_scalar
from .batch import PairBatch, Side, View
from .directions import TwoDirectionLoss
from .log_domain import cross_entropy


class DebiasedContrastiveLoss(TwoDirectionLoss):
    """InfoNCE with the debiased estimate of its negatives (arXiv:2007.00224), of optional hardness (arXiv:2010.04592).

    A share tau_plus of what is drawn as negatives has the positive's class. With S_ij = logit_scale <image_i, text_j>
    and N the negatives of a row, all other texts of the whole batch, the term of image i is

        -log(exp(S_ii) / (exp(S_ii) + N g_i)),
        g_i = max((h_i - tau_plus exp(S_ii)) / (1 - tau_plus), exp(-logit_scale)),
        h_i = sum_{j != i} exp((1 + beta) S_ij) / sum_{j != i} exp(beta S_ij),

    that of a text the same with S_ji, and each direction is a mean over the whole batch. With beta = 0, h_i is the mean
    of exp(S_ij); beta > 0 moves its weight to the hardest negatives. The lower bound of g is the least that exp(S) can
    be for unit vectors; its gradient goes to the scale. tau_plus = beta = 0 is `ClipLoss`. Everything is computed from
    logarithms, so that no scale overflows. A batch of one pair has no negatives and the loss 0.

    Args:
        tau_plus: the share of false negatives, from 0 to below 1; about 1 / (number of classes).
        beta: hardness, at least 0, a factor of S. Two statistics of the same sweep instead of one.
        options: direction_weights, rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: numbers out of their range, or options as in `ClipLoss`.
    """

    def __init__(self, *, tau_plus: float = 0.1, beta: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= tau_plus < 1:
            raise ValueError(f"tau_plus={tau_plus!r}: expected a share of false negatives, from 0 to below 1")
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta={beta!r}: expected a number of at least 0")
        self.tau_plus = tau_plus
        self.beta = beta

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], unit vectors, any floating dtype.
            text_features: [batch, D].
            logit_scale: the factor itself, 1 / temperature, a float or a tensor of shape [] or [1].
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        batch = PairBatch(Side(image_features), Side(text_features), exchange=self._exchange())
        rows, cols = (self._ask if weight else None for weight in self.direction_weights)
        of_images, of_texts = batch.reduce(scale=logit_scale, rows=rows, cols=cols)
        negatives = batch.shards.total - 1
        terms = [self._terms(found, negatives, logit_scale) if found else None for found in (of_images, of_texts)]
        loss = self._combined(terms[0], terms[1], batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _ask(self, view: View) -> list[Reduction]:
        if not self.beta:
            return [PairScore(view.own), LogSumExp(exclude=view.own)]
        # Without an offset the pace is a plain factor.
        return [
            PairScore(view.own),
            LogSumExp(exclude=view.own, of=Paced(1 + self.beta, 0, 1, 0)),
            LogSumExp(exclude=view.own, of=Paced(self.beta, 0, 1, 0)),
        ]

    def _terms(self, results: tuple[Tensor, ...], negatives: int, scale: float | Tensor) -> Tensor:
        own, others, *tilt = results
        log_count = math.log(max(1, negatives))
        alone = others.isneginf()
        log_total = tilt[0].masked_fill(alone, 0) if tilt else log_count
        log_mean = others.masked_fill(alone, 0) - log_total
        floor = -factor(scale, "logit_scale", own.dtype, own.device)
        log_g = self._debiased(log_mean, own, floor)
        return cross_entropy(log_count + log_g, own).masked_fill(alone, 0)

    def _debiased(self, log_mean: Tensor, own: Tensor, floor: Tensor) -> Tensor:
        """log g from log h, S_ii and the logarithm of the lower bound."""
        if not self.tau_plus:
            return torch.maximum(log_mean, floor)
        # log(h - tau_plus exp(S_ii)) = log h + log(1 - exp(gap)), which only a negative gap has.
        gap = math.log(self.tau_plus) + own - log_mean
        positive = gap < 0
        log_rest = torch.log(-torch.expm1(gap.masked_fill(~positive, -1)))
        log_g = log_mean + log_rest - math.log1p(-self.tau_plus)
        return torch.where(positive & (log_g > floor), log_g, floor)
