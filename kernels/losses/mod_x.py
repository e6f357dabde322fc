"""Distillation of the similarity matrix of an earlier model, for continual training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contrastive import ArgMax, Reduction, SoftmaxMean
from .base import check_pairs, check_scalar
from .batch import View
from .directions import TwoDirectionLoss
from .log_domain import cross_entropy
from .soft_target import soft_cross_entropy, soft_targets, taught_batch


class ModXLoss(TwoDirectionLoss):
    """Contrast, and the divergence from the previous model's similarities (Mod-X, arXiv:2305.07437).

    With S_ij = logit_scale <image_i, text_j> and T_ij = old_logit_scale <old_image_i, old_text_j>, the term of row i is

        clip_loss_weight * -log softmax_j(S_ij)[i] + distill_weight * g_i KL(softmax_j(T_ij) || softmax_j(S_ij)),

    g_i = 1 where the previous model is right, that is where the largest T_ij is T_ii, and 0 elsewhere; that of column j
    the same along the columns, with a gate of its own. Among equal scores the first is the largest. The authors' code
    adds the divergences of a batch up, so that its weight alpha is distill_weight / batch here, and takes cosines as S and
    T there: a call of its own, with both scales 1 and clip_loss_weight=0. No gradient goes to the previous model.

    Args:
        distill_weight: factor of the divergence.
        clip_loss_weight: factor of the contrastive term. At 0 the divergence is left.
        direction_weights: (image to text, text to image). A direction of weight 0 is not computed.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
    """

    def __init__(
        self,
        *,
        distill_weight: float = 1.0,
        clip_loss_weight: float = 1.0,
        direction_weights: tuple[float, float] = (0.5, 0.5),
        **options: Any,
    ) -> None:
        super().__init__(direction_weights=direction_weights, **options)
        self.distill_weight = distill_weight
        self.clip_loss_weight = clip_loss_weight

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        old_image_features: Tensor,
        old_text_features: Tensor,
        old_logit_scale: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], normalised as the model defines it; any floating dtype.
            text_features: [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            old_image_features: [batch, D'], the same images by the previous model; any width and floating dtype.
            old_text_features: [batch, D'].
            old_logit_scale: the previous model's, like logit_scale; None: the value of logit_scale.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        old_scale = logit_scale if old_logit_scale is None else old_logit_scale
        old = [old_image_features], [old_text_features], [old_scale]
        batch = taught_batch(image_features, text_features, *old, self._exchange())
        reduced = self._reduced(batch, _asked, scale=logit_scale)
        teacher_own = batch.teacher_scores()
        start, stop = batch.shards.start, batch.shards.start + image_features.shape[0]
        position = torch.arange(start, stop, device=image_features.device)

        def formula(*results: Tensor) -> Tensor:
            *of_both, teacher_mean, teacher_best = results
            one_hot, gap = soft_cross_entropy(of_both, teacher_own)
            # KL = cross-entropy - entropy, and the entropy is the teacher's cross-entropy against itself.
            others, own = of_both[2], teacher_own[0]
            entropy = cross_entropy(others, own) + torch.sigmoid(others - own) * (own - teacher_mean)
            # The last term is 0, or NaN where the old model's scores are: a closed gate would hide that.
            gated = torch.where(teacher_best == position, one_hot + gap - entropy, 0 * entropy.detach())
            return self.clip_loss_weight * one_hot + self.distill_weight * gated

        loss = self._combined(*self._each(formula, reduced), batch)
        return {"contrastive_loss": loss} if output_dict else loss


def _asked(view: View) -> list[Reduction]:
    (old,) = view.teachers
    return [*soft_targets(view), SoftmaxMean(of=old, under=old, exclude=view.own), ArgMax(of=old)]
