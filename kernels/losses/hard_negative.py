"""Cross-entropy against the hardest negatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..contrastive import AbovePositive, LogSumExp, PairRule, PairScore, Reduction, TopK
from ..contrastive.arguments import FEATURE_DTYPES
from .base import check_matrix, check_pairs, check_scalar
from .batch import PairBatch, Side, View
from .directions import TwoDirectionLoss
from .log_domain import cross_entropy, log_add_exp, log_sum_exp


class HardNegativeLoss(TwoDirectionLoss):
    """Cross-entropy over a pair and its k hardest negatives, false negatives left out (UniME, arXiv:2504.17432).

    With c_ij = <image_i, text_j> and S_ij = logit_scale c_ij, the candidates of image i are the other texts of the whole
    batch with c_ij <= c_ii + threshold: what scores higher by more is taken for a false negative. H_i are the k of them
    with the largest scores, and the term of image i is

        -log(exp(S_ii) / (exp(S_ii) + sum_{j in H_i} exp(S_ij) + sum_k exp(logit_scale <image_i, negative_ik>))).

    The last sum has the image's own negatives (`negative_features`), such as negative descriptions written for it
    (HQ-CLIP, "Leveraging Large Vision-Language Models to Create High-Quality Image-Text Datasets and CLIP Models"): they
    meet no other image, and neither the threshold nor k touches them. The term of a text is the same with S_ji, without
    that sum, and each direction is a mean over the whole batch. UniME has one direction, queries to targets:
    direction_weights=(1.0, 0.0).

    Which negatives are chosen has no gradient, their scores have. Among equal scores the lowest index is taken. A pair
    without any negative has the loss 0. k=None and threshold=None is `ClipLoss`, also with its extra negatives.

    Args:
        k: how many, from 1 to 1024; None: all.
        threshold: in units of the cosine, not of the scaled scores, for a positive logit_scale; None: no candidate is
            left out.
        options: direction_weights, rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: k or the threshold out of range, or options as in `ClipLoss`.
    """

    def __init__(self, *, k: int | None = 8, threshold: float | None = 0.1, **options: Any) -> None:
        super().__init__(**options)
        if k is not None and (not isinstance(k, int) or not 1 <= k <= 1024):
            raise ValueError(f"k={k!r}: expected a whole number from 1 to 1024, or None for all negatives")
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold={threshold!r}: expected a number in units of the cosine, or None")
        self.k = k
        self.threshold = threshold

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
        *,
        negative_text_features: Tensor | None = None,
        negative_image_features: Tensor | None = None,
        negative_features: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], unit vectors where the threshold is to mean a cosine; any floating dtype.
            text_features: [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            output_dict: return {"contrastive_loss": loss}.
            negative_text_features: [K, D]: texts that belong to no image, candidates of every image, subject to k and
                the threshold. With several ranks those of all; all pass a tensor or none does.
            negative_image_features: [K', D], the same for the texts.
            negative_features: [batch, K, D]: of each image K texts that meet no other image.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        batch = PairBatch(
            Side(image_features),
            Side(text_features),
            exchange=self._exchange(),
            x_extra=_extra("negative_image_features", negative_image_features, image_features),
            y_extra=_extra("negative_text_features", negative_text_features, image_features),
        )
        if negative_features is not None:
            _check_own_negatives(negative_features, image_features)
        by_image, by_text = self.direction_weights
        of_images, of_texts = batch.reduce(
            scale=logit_scale,
            rows=(lambda view: self._ask(view, logit_scale)) if by_image else None,
            cols=(lambda view: self._ask(view, logit_scale)) if by_text else None,
        )
        image_terms = text_terms = None
        if by_image:
            others = self._others(of_images[0])
            if negative_features is not None:
                others = log_add_exp(others, _over_own_negatives(image_features, negative_features, logit_scale))
            image_terms = cross_entropy(others, of_images[1])
        if by_text:
            text_terms = cross_entropy(self._others(of_texts[0]), of_texts[1])
        loss = self._combined(image_terms, text_terms, batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _ask(self, view: View, scale: float | Tensor) -> list[Reduction]:
        exclude: tuple[PairRule, ...] = (view.own,)
        if self.threshold is not None:
            # The rule compares scaled scores.
            factor = scale.detach().reshape(()) if isinstance(scale, Tensor) else scale
            exclude += (AbovePositive(self.threshold * factor, view.own),)
        return [LogSumExp(exclude) if self.k is None else TopK(self.k, exclude), PairScore(view.own)]

    def _others(self, found: Tensor) -> Tensor:
        return found if self.k is None else log_sum_exp(found)


def _extra(name: str, features: Tensor | None, beside: Tensor) -> Side | None:
    if features is None:
        return None
    check_matrix(name, features, width=beside.shape[1])
    return Side(features)


def _check_own_negatives(negatives: Tensor, images: Tensor) -> None:
    if not isinstance(negatives, Tensor) or negatives.dtype not in FEATURE_DTYPES:
        given = negatives.dtype if isinstance(negatives, Tensor) else type(negatives).__name__
        raise TypeError(f"negative_features is {given}: expected a float16, bfloat16, float32 or float64 tensor")
    n, width = images.shape
    if negatives.dim() != 3 or negatives.shape[0] != n or negatives.shape[2] != width:
        raise ValueError(
            f"negative_features has shape {list(negatives.shape)}: expected [{n}, K, {width}], K texts for each image"
        )


def _over_own_negatives(images: Tensor, negatives: Tensor, scale: float | Tensor) -> Tensor:
    """log sum_k exp(scale <image_i, negative_ik>), [n], in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(images.dtype, negatives.dtype), torch.float32)
    with torch.autocast(images.device.type, enabled=False):
        cosines = torch.einsum("nd,nkd->nk", images.to(dtype), negatives.to(dtype))
    return log_sum_exp(cosines * (scale.reshape(()) if isinstance(scale, Tensor) else scale))
