"""Alignment and uniformity on the sphere, within modalities and across."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..contrastive import Diagonal, LogSumExp, similarity_reduce
from ..distributed import Exchange, Shards, gather_counts
from .base import ContrastiveLoss, check_pairs, check_scalar
from .cacr import squared_distances, squared_norms
from .clip import ClipLoss


class AlignmentUniformityLoss(ContrastiveLoss):
    """Contrast, alignment and uniformity of two modalities (arXiv:2405.18570, after arXiv:2005.10242).

    With x_i and y_i the features of pair i, and sums over i, j of the whole batch,

        clip_loss_weight * ClipLoss(x, y)
        + alignment_weight * mean_i |x_i - y_i|^2
        + uniformity_weight * (log mean_{i != j} exp(-t |x_i - x_j|^2) + log mean_{i != j} exp(-t |y_i - y_j|^2)) / 2
        + cross_uniformity_weight * log mean_{i != j} exp(-t |x_i - y_j|^2).

    With all weights 1 the paper's CUAXU, without the last term its CUA, and with the two in the middle alone the loss
    of "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere". A term
    of weight 0 is not computed. Uniformity expects unit vectors, and takes any.

    The logarithms are of means over the whole batch, so that there are no terms of single pairs: reduction is "mean".
    In a batch of one pair uniformity is 0.

    Args:
        t: inverse width of the Gaussian.
        alignment_weight, uniformity_weight, cross_uniformity_weight, clip_loss_weight: as in the formula.
        options: rank, world_size, local_loss, group, strategy, as in `ClipLoss`; with local_loss the alignment and the
            contrast of this rank's share are returned, and the uniformity of the whole batch.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
    """

    def __init__(
        self,
        *,
        t: float = 2.0,
        alignment_weight: float = 1.0,
        uniformity_weight: float = 1.0,
        cross_uniformity_weight: float = 1.0,
        clip_loss_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.reduction != "mean":
            raise ValueError(f'reduction={self.reduction!r}: uniformity is the logarithm of a mean; expected "mean"')
        if not isinstance(t, (int, float)) or not 0 < t < math.inf:
            raise ValueError(f"t={t!r}: expected a positive number")
        self.t = float(t)
        self.alignment_weight = alignment_weight
        self.uniformity_weight = uniformity_weight
        self.cross_uniformity_weight = cross_uniformity_weight
        self.clip_loss_weight = clip_loss_weight
        if not any((alignment_weight, uniformity_weight, cross_uniformity_weight, clip_loss_weight)):
            raise ValueError("all four weights are 0: expected one that is not")
        self.contrast = ClipLoss(**options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor = 1.0,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: x [batch, D]; any floating dtype.
            text_features: y [batch, D].
            logit_scale: the factor of the contrastive term's logits, a float or a tensor of shape [] or [1]; the other
                terms have none.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features).

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        exchange = self._exchange()
        batch = gather_counts(len(image_features), device=image_features.device, group=self._group())
        terms = []
        if self.alignment_weight:
            distances = squared_distances(image_features, text_features)
            terms.append(self.alignment_weight * self._finish(distances, batch))
        if self.uniformity_weight:
            for one in (image_features, text_features):
                # The pairs (i, j) and (j, i) are the same: what the columns would add to the gradient is the rows' own.
                doubled: Tensor = _WithTwiceTheGradient.apply(one)
                terms.append(self.uniformity_weight / 2 * self._uniformity(doubled, one.detach(), exchange, batch))
        if self.cross_uniformity_weight:
            terms.append(
                self.cross_uniformity_weight * self._uniformity(image_features, text_features, exchange, batch)
            )
        if self.clip_loss_weight:
            terms.append(self.clip_loss_weight * self.contrast(image_features, text_features, logit_scale))
        loss = torch.stack(terms).sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _uniformity(self, x: Tensor, y: Tensor, exchange: Exchange | None, batch: Shards) -> Tensor:
        """log mean_{i != j} exp(-t |x_i - y_j|^2) of this rank's x and all ranks' y."""
        (of_rows,), _ = similarity_reduce(
            x,
            y,
            scale=2 * self.t,
            row_bias=-self.t * squared_norms(x),
            col_bias=-self.t * squared_norms(y),
            rows=[LogSumExp(exclude=Diagonal())],
            group=exchange,
        )
        if batch.total < 2:
            return of_rows.new_zeros(())
        # -inf, of which logsumexp has no gradient, where this rank has no rows
        here = of_rows.logsumexp(0) if len(of_rows) else of_rows.sum() - torch.inf
        if batch.group is not None:
            here = _LogSumExpOverRanks.apply(here, batch)
        # as a tensor: torch.compile would take the logarithm of a number as a constant
        return here - here.new_full((), batch.total * (batch.total - 1)).log()


class _WithTwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class _LogSumExpOverRanks(torch.autograd.Function):
    """log sum_r exp(l_r) over the ranks, the same bits on each. The trainer's mean of the gradients is the exact one."""

    @staticmethod
    def forward(ctx: Any, here: Tensor, shards: Shards) -> Tensor:
        largest = here.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=shards.group)
        total = (here - largest).exp()
        dist.all_reduce(total, group=shards.group)
        result = largest + total.log()
        ctx.save_for_backward(shards.world_size * (here - result).exp())
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad * weight, None
