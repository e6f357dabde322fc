"""The loss of SigLIP."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..contrastive import Diagonal, Reduction, SoftplusSum, similarity_reduce
from ..contrastive.operator import resolved_operands
from ..contrastive.ring_sum import ring_sum
from ..contrastive.sums import sigmoid_sum
from ..distributed import Exchange, gather
from .base import ContrastiveLoss, Scope, check_pairs, check_scalar
from .batch import PairBatch, Side, View

_OPEN_CLIP_EXCHANGES = (None, "bidir", "shift", "reduce", "gather")


class SigLipLoss(ContrastiveLoss):
    """Pairwise sigmoid loss (SigLIP, arXiv:2303.15343), in O(batch) memory.

    With S_ij = logit_scale <image_i, text_j> + logit_bias, and z_ij = +1 for i = j, -1 otherwise, the term of
    image i is sum_j softplus(-z_ij S_ij) over all texts of the whole batch, and the loss is the mean of the
    terms over the images: the sum over pairs divided by the batch size, as in the paper and in open_clip.

    A drop-in for open_clip's class of this name: the same constructor and forward. Several ranks, the value and
    the gradient are as in `ClipLoss`.

    Args:
        cache_labels: accepted and without effect.
        rank: this process, if world_size > 1.
        world_size: above 1 the batch is spread over the default process group.
        dist_impl: None, "bidir", "shift", "reduce" or "gather": accepted and without effect, since all of them
            are the same function; `strategy` chooses the exchange.
        group: process group to use instead of the default one; rank and world_size may then be left out.
        strategy: "gather": every rank holds all text features during the loss; "ring": its own and two passing shards.
        scope, wire_dtype, node_size: as in `ContrastiveLoss`.
        reduction: "mean", "sum" (both over the whole batch), or "none": the terms of this rank's images.
        local_loss: return this rank's share L_r, whose mean over ranks is the loss.

    Raises:
        ValueError: options that this version does not have.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        strategy: str = "gather",
        reduction: str = "mean",
        local_loss: bool = False,
        scope: Scope = "global",
        wire_dtype: torch.dtype | None = None,
        node_size: int | None = None,
    ) -> None:
        super().__init__(
            rank=rank,
            world_size=world_size,
            local_loss=local_loss,
            group=group,
            strategy=strategy,
            reduction=reduction,
            scope=scope,
            wire_dtype=wire_dtype,
            node_size=node_size,
        )
        if dist_impl not in _OPEN_CLIP_EXCHANGES:
            known = ", ".join(repr(name) for name in _OPEN_CLIP_EXCHANGES)
            raise ValueError(f"dist_impl={dist_impl!r}: expected one of {known}")
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], normalised as the model defines it; any floating dtype.
            text_features: [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            logit_bias: a float, a tensor of shape [] or [1], or None for 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        check_scalar("logit_bias", logit_bias)
        bias = 0.0 if logit_bias is None else logit_bias
        exchange = self._exchange()
        if exchange is not None and exchange.strategy == "ring":
            loss = self._in_ring(exchange, image_features, text_features, logit_scale, bias)
            return {"contrastive_loss": loss} if output_dict else loss
        batch, (all_texts,) = gather(text_features, group=self._group(), wire_dtype=self.wire_dtype)
        positive = Diagonal(batch.start)
        if self.reduction == "none":
            asked = (SoftplusSum(positive=positive),)
            (terms,), _ = similarity_reduce(image_features, all_texts, scale=logit_scale, bias=bias, rows=asked)
        else:
            inside, outside = self._weights(batch)
            terms = sigmoid_sum(
                image_features, all_texts, scale=logit_scale, bias=bias, positive=positive, weight=inside
            )
            terms = terms if outside == 1 else terms * outside
        loss = self._finish(terms, batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _in_ring(
        self, exchange: Exchange, images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor
    ) -> Tensor:
        pairs = PairBatch(Side(images), Side(texts), exchange)
        if self.reduction == "none" or not pairs.rings:
            (terms,), _ = pairs.reduce(scale=scale, bias=bias, rows=_sigmoids)
            return self._finish(terms, pairs.shards)
        weight = pairs.shards.weight(self.reduction)

        def block_sum(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, shift: int) -> Tensor:
            shifted = 0.0 if bias is None else bias
            return sigmoid_sum(x, y, scale=scale, bias=shifted, positive=Diagonal(shift), weight=weight)

        return self._finish(ring_sum(block_sum, exchange, resolved_operands(images, texts, scale, bias)), pairs.shards)


def _sigmoids(view: View) -> tuple[Reduction, ...]:
    return (SoftplusSum(positive=view.own),)
