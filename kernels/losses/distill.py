"""The losses of MobileCLIP: contrast and distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .base import check_pairs, check_scalar
from .clip import ClipLoss
from .soft_target import soft_cross_entropy, soft_targets, taught_batch


class DistillClipLoss(ClipLoss):
    """Contrastive and distillation loss (MobileCLIP, arXiv:2311.17049): two terms, from one sweep.

    With S_ij = logit_scale <image_i, text_j> and, for each of K teachers, T_ij = dist_logit_scale <its image_i, its
    text_j>, the distillation term of row i is the cross-entropy against the teachers' mean softmax,

        -sum_j y_ij log softmax_j(S_ij),  y_ij = mean_k softmax_j(T^k_ij),

    that of column j the same along the columns. The contrastive term is `ClipLoss`. Both are computed as in
    `SoftTargetLoss`, without cancellation and without storing any similarity. No gradient goes to a teacher.

    A drop-in for open_clip's class of this name: the same constructor, forward and results, for one teacher or
    several. On several ranks value and gradient of both terms are those of the whole batch, teachers included
    (open_clip's are the rank's own with local_loss=True, and lack the other ranks' gradients without
    gather_with_grad). The paper weighs the terms 1 - lambda and lambda; that is left to the caller, as in open_clip.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in `ClipLoss`.
        group, strategy, direction_weights: as in `ClipLoss`, for both terms.
        reduction: "mean", "sum", or "none": both terms of this rank's pairs, [batch] each.

    Raises:
        ValueError: as `ClipLoss`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: dist.ProcessGroup | None = None,
        strategy: str = "gather",
        reduction: str = "mean",
        direction_weights: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        super().__init__(
            local_loss,
            gather_with_grad,
            cache_labels,
            rank,
            world_size,
            use_horovod,
            group=group,
            strategy=strategy,
            reduction=reduction,
            direction_weights=direction_weights,
        )

    def forward(  # type: ignore[override]  # open_clip's class overrides the signature of its ClipLoss too
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor | Sequence[Tensor],
        dist_text_features: Tensor | Sequence[Tensor],
        dist_logit_scale: float | Tensor | Sequence[float | Tensor],
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both terms of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], normalised as the model defines it; any floating dtype.
            text_features: [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            dist_image_features: [batch, D'], a teacher's, of any width and floating dtype; or a list of K of them.
            dist_text_features: [batch, D'], or a list of K.
            dist_logit_scale: the teacher's factor, like logit_scale; or a list of K, or one for all.
            output_dict: return {"contrastive_loss": ..., "distill_loss": ...}.

        Returns:
            (contrastive loss, distillation loss), float32 (float64 for float64 features) scalars.

        Raises:
            ValueError, TypeError: shapes, dtypes or numbers of teachers that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        teachers = _listed(dist_image_features, dist_text_features, dist_logit_scale)
        batch = taught_batch(image_features, text_features, *teachers, self._exchange())
        rows, cols = (soft_targets if weight else None for weight in self.direction_weights)
        reduced = batch.reduce(scale=logit_scale, rows=rows, cols=cols)
        teacher_own = batch.teacher_scores()
        both = [
            (weight, soft_cross_entropy(results, teacher_own))
            for weight, results in zip(self.direction_weights, reduced, strict=True)
            if weight
        ]
        contrastive = torch.stack([weight * one_hot for weight, (one_hot, _) in both]).sum(0)
        distilled = contrastive + torch.stack([weight * gap for weight, (_, gap) in both]).sum(0)
        losses = self._finish(contrastive, batch.shards), self._finish(distilled, batch.shards)
        return dict(zip(("contrastive_loss", "distill_loss"), losses, strict=True)) if output_dict else losses


def _listed(
    images: Tensor | Sequence[Tensor],
    texts: Tensor | Sequence[Tensor],
    scales: float | Tensor | Sequence[float | Tensor],
) -> tuple[list[Tensor], list[Tensor], list[float | Tensor]]:
    """One entry for each teacher."""
    images = [images] if isinstance(images, Tensor) else list(images)
    texts = [texts] if isinstance(texts, Tensor) else list(texts)
    scales = [scales] * len(images) if isinstance(scales, (int, float, Tensor)) else list(scales)
    if not images or len({len(images), len(texts), len(scales)}) > 1:
        raise ValueError(
            f"{len(images)} teachers' image features, {len(texts)} text features and {len(scales)} logit scales: "
            "expected as many of each, and one at least"
        )
    return images, texts, scales
