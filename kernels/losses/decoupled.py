"""The decoupled contrastive loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..contrastive import Diagonal, LogSumExp, PairScore, Reduction, similarity_reduce
from ..distributed import gather
from .base import check_pairs, check_scalar
from .batch import PairBatch, Side, View
from .directions import TwoDirectionLoss
from .log_domain import log_add_exp


class DecoupledContrastiveLoss(TwoDirectionLoss):
    """InfoNCE without the positive in its denominator (DCL and DCLW, arXiv:2110.06848).

    With S_ij = logit_scale <image_i, text_j>, the term of image i is

        -w_i S_ii + log sum_{j != i} exp(S_ij),

    that of a text the same with S_ji, and each direction is a mean over the whole batch. The gradient of a pair's
    negatives does not fade as the pair aligns, which small batches gain from. The loss may be negative.

    w_i = 1 in DCL. In DCLW (`weighted=True`) pairs that are far apart count more,

        w_i = 2 - exp(<image_i, text_i> / sigma) / mean_k exp(<image_k, text_k> / sigma),

    whose mean over the whole batch, that of all ranks, is 1. The gradient goes through w, which is a part of the paper's
    formula. (Code that subtracts a softmax over the batch without its factor N has weights of mean 2 - 1/N.)

    With `intra=True` the denominator is that of SimCLR's 2N views: an image has the other images among its negatives, a
    text the other texts,

        log(sum_{j != i} exp(S_ij) + sum_{j != i} exp(logit_scale <image_i, image_j>)).

    A batch of one pair has no negatives; its term is 0.

    Args:
        weighted: DCLW.
        sigma: of the weights, in units of the cosine.
        intra: whether a modality's own similarities are negatives too. Two sweeps more.
        options: direction_weights, rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: a sigma that is not positive, or options as in `ClipLoss`.
    """

    def __init__(self, *, weighted: bool = False, sigma: float = 0.5, intra: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma={sigma!r}: expected a positive number")
        self.weighted = weighted
        self.sigma = sigma
        self.intra = intra

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], any floating dtype; unit vectors, for the weights of DCLW to mean what they say.
            text_features: [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        batch = PairBatch(Side(image_features), Side(text_features), exchange=self._exchange())
        rows, cols = (_ask if weight else None for weight in self.direction_weights)
        of_images, of_texts = batch.reduce(scale=logit_scale, rows=rows, cols=cols)
        weights = self._positive_weights(batch) if self.weighted else 1.0
        terms = [
            self._terms(results, weights, side, logit_scale, batch) if results else None
            for results, side in ((of_images, 0), (of_texts, 1))
        ]
        loss = self._combined(terms[0], terms[1], batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _terms(
        self,
        results: tuple[Tensor, ...],
        weights: float | Tensor,
        side: int,
        scale: float | Tensor,
        batch: PairBatch,
    ) -> Tensor:
        others, own = results
        if self.intra:
            others = log_add_exp(others, _others_within(batch, side, scale))
        alone = others.isneginf()
        return (others.masked_fill(alone, 0) - weights * own).masked_fill(alone, 0)

    def _positive_weights(self, batch: PairBatch) -> Tensor:
        """w of this rank's pairs, [n]."""
        x, y = batch.x.features, batch.y.features
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        logits = (x.to(dtype) * y.to(dtype)).sum(-1) / self.sigma
        shards, (everyone,) = gather(logits.unsqueeze(1), group=batch.group)
        log_mean = torch.logsumexp(everyone, 0) - math.log(max(1, shards.total))
        weights: Tensor = 2 - (logits - log_mean).exp()
        return weights


def _ask(view: View) -> tuple[Reduction, ...]:
    return LogSumExp(exclude=view.own), PairScore(view.own)


def _others_within(batch: PairBatch, side: int, scale: float | Tensor) -> Tensor:
    """log-sum-exp of each of this rank's x (side 0) or y (side 1) over the others of its own modality, all ranks'."""
    mine = (batch.x, batch.y)[side].features
    if batch.rings:
        (others,), _ = similarity_reduce(
            mine, mine, scale=scale, rows=[LogSumExp(exclude=Diagonal())], group=batch.exchange
        )
        return others
    everyone = batch.whole[side].features
    own = Diagonal(batch.shards.start)
    (others,), _ = similarity_reduce(mine, everyone, scale=scale, rows=[LogSumExp(exclude=own)])
    return others
