"""Similarity distribution matching: reverse divergence from the distribution of equal ids."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive import LogSumExp, PairScore, Reduction, SoftmaxMean
from .base import check_pairs, check_scalar
from .batch import PairBatch, Side, View
from .directions import TwoDirectionLoss
from .positives import ById, paired_ids


class SDMLoss(TwoDirectionLoss):
    """Similarity distribution matching (SDM of IRRA, arXiv:2303.12501): KL(p || q) from ids.

    With S_ij = logit_scale <image_i, text_j>, p_ij = softmax_j(S_ij) and q_ij = [id_i = id_j] / n_i, n_i the number of
    texts with the id of image i, the term of row i is

        sum_j p_ij log(p_ij / (q_ij + eps)),

    that of column j the same along the columns. The paper adds the directions up, which is the default of
    direction_weights. An image without a text has the term 0. The positives and the others are reduced apart, so that
    the small part of the two does not drown in the large one.

    Args:
        eps: keeps the divergence finite where q_ij = 0.
        direction_weights: (image to text, text to image). A direction of weight 0 is not computed.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
    """

    def __init__(
        self,
        *,
        eps: float = 1e-8,
        direction_weights: tuple[float, float] = (1.0, 1.0),
        **options: Any,
    ) -> None:
        super().__init__(direction_weights=direction_weights, **options)
        if not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
            raise ValueError(f"eps={eps!r}: expected a positive number")
        self.eps = float(eps)

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
            image_ids: int64 [n], of one meaning on all ranks: whom the image shows. All ranks pass ids or none does.
                Without any, image i belongs to text i alone.
            text_ids: int64 [m]. Where image i belongs to text i one of the two serves both.

        Returns:
            A scalar in float32 (float64 for float64 features); [n] for reduction="none", which needs n = m or one
            direction alone.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_scalar("logit_scale", logit_scale)
        if image_ids is None and text_ids is None:
            check_pairs(image_features, text_features)
            batch = PairBatch(Side(image_features), Side(text_features), self._exchange())
            ask, counts = _by_position, None
        else:
            image_ids, text_ids = paired_ids(image_features, text_features, image_ids, text_ids)
            batch = PairBatch(Side(image_features, image_ids), Side(text_features, text_ids), self._exchange())
            ask, counts = _by_id, _counts(batch)
        reduced = self._reduced(batch, ask, scale=logit_scale)
        of_images, of_texts = (
            self._divergence(results, of_owners) if results else None
            for results, of_owners in zip(reduced, counts or (None, None), strict=True)
        )
        loss = self._combined(of_images, of_texts, batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _divergence(self, results: tuple[Tensor, ...], counts: Tensor | None) -> Tensor:
        """The owners' terms, from the log-sum-exp and the mean score of the negatives and of the positives."""
        negative, negative_mean, positive, *by_id = results
        n = torch.ones_like(positive) if counts is None else counts.to(positive.dtype)
        none, all_of_them = n == 0, negative.isneginf()
        n = n.masked_fill(none, 1)
        positive = positive.masked_fill(none, 0)
        # How far the positives' mean lies below their log-sum-exp over n, which of a single one is its score.
        below = (by_id[0] - positive + n.log()).masked_fill(n == 1, 0) if by_id else torch.zeros_like(positive)
        attracted = below - torch.log1p(n * self.eps)
        # Each part is a function of the difference alone, so that the small one keeps its digits.
        difference = (positive - negative).masked_fill(all_of_them, 0)
        repelled = (negative_mean - negative).masked_fill(all_of_them, 0) - math.log(self.eps)
        of_positives = torch.sigmoid(difference) * (attracted + F.logsigmoid(difference))
        of_negatives = torch.sigmoid(-difference) * (repelled + F.logsigmoid(-difference))
        terms = torch.where(all_of_them, attracted, of_positives + of_negatives)
        return terms.masked_fill(none, 0)


def _by_position(view: View) -> list[Reduction]:
    return [LogSumExp(exclude=view.own), SoftmaxMean(exclude=view.own), PairScore(view.own)]


def _by_id(view: View) -> list[Reduction]:
    same, different = view.same, view.different
    return [
        LogSumExp(exclude=same),
        SoftmaxMean(exclude=same),
        LogSumExp(exclude=different),
        SoftmaxMean(exclude=different),
    ]


def _counts(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """How many positives this rank's images and its texts have."""
    assert batch.x.ids is not None
    assert batch.y.ids is not None
    all_x, all_y = batch.whole
    assert all_x.ids is not None
    assert all_y.ids is not None
    return ById(batch.x.ids, all_y.ids).counts(), ById(batch.y.ids, all_x.ids).counts()
