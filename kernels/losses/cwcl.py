"""The continuously weighted contrastive loss: soft targets from a locked tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contrastive import LogSumExp, PairScore, Reduction
from ..contrastive.arguments import factor
from ..distributed import gather
from .base import check_matrix, check_pairs, check_scalar
from .batch import PairBatch, Side, View
from .directions import TwoDirectionLoss
from .log_domain import cross_entropy, log_add_exp


class CWCLLoss(TwoDirectionLoss):
    """Continuously weighted contrastive loss (CWCL, arXiv:2309.14580): a locked tower teaches the other one.

    With S_ij = logit_scale <image_i, text_j>, the images' tower locked, and weights w_ij = <p_i, p_j> / 2 + 1/2 from its
    unit vectors p, the term of image i weighs all texts as positives, that of text i is the cross-entropy of CLIP:

        -sum_j w_ij log softmax_j(S_ij) / sum_j w_ij,    -log softmax_j(S_ji)[i].

    The paper adds them up, which is the default of direction_weights. The weights are affine in p, so that
    sum_j w_ij S_ij comes from the texts' sum and from the D' x D moment sum_j p_j text_j^T, and no matrix of weights
    is needed. No gradient goes through the weights.

    Args:
        direction_weights: (image to text, the weighted term; text to image). A direction of weight 0 is not computed.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
    """

    def __init__(self, *, direction_weights: tuple[float, float] = (1.0, 1.0), **options: Any) -> None:
        super().__init__(direction_weights=direction_weights, **options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        locked_features: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], of the locked modality, whichever that is.
            text_features: [batch, D], of the modality that learns.
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            locked_features: [batch, D'], the unit vectors p of the locked tower, before a projection say; None:
                image_features.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        locked = image_features if locked_features is None else locked_features
        check_matrix("locked_features", locked)
        if locked.shape[0] != image_features.shape[0]:
            raise ValueError(
                f"locked_features has shape {list(locked.shape)}: expected [{image_features.shape[0]}, any], one "
                "vector for each image"
            )
        batch = PairBatch(Side(image_features), Side(text_features), self._exchange())
        _, (all_locked,) = gather(locked.detach(), group=batch.group)
        weighted, one_hot = self.direction_weights
        of_images, of_texts = batch.reduce(
            scale=logit_scale,
            rows=_ask if weighted else None,
            cols=_ask if one_hot else None,
        )
        with torch.autocast(locked.device.type, enabled=False):
            mean_score = _weighted_mean(image_features, batch.whole[1].features, locked.detach(), all_locked)
        loss = self._combined(
            log_add_exp(*of_images) - _scaled(mean_score, logit_scale) if weighted else None,
            cross_entropy(*of_texts) if one_hot else None,
            batch,
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _scaled(scores: Tensor, scale: float | Tensor) -> Tensor:
    return factor(scale, "logit_scale", scores.dtype, scores.device) * scores


def _ask(view: View) -> list[Reduction]:
    # One request for both directions shares its exponentials.
    return [LogSumExp(exclude=view.own), PairScore(view.own)]


def _weighted_mean(images: Tensor, texts: Tensor, locked: Tensor, all_locked: Tensor) -> Tensor:
    """[n]: sum_j w_ij <image_i, text_j> / sum_j w_ij of n images and all texts, w_ij = (<p_i, p_j> + 1) / 2."""
    dtype = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    images, texts, locked, all_locked = (each.to(dtype) for each in (images, texts, locked, all_locked))
    by_moment = torch.linalg.vecdot(locked @ (all_locked.T @ texts), images)
    total = locked @ all_locked.sum(0) + len(all_locked)
    mean: Tensor = (by_moment + images @ texts.sum(0)) / total
    return mean
