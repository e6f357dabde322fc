"""The loss of CLIP."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..contrastive import Diagonal, LogSumExp, PairScore, Reduction
from ..contrastive.sums import cross_entropies, cross_entropy_sum
from ..distributed import Exchange, Shards, gather, gather_counts
from .base import ContrastiveLoss, Scope, check_matrix, check_pairs, check_scalar
from .batch import PairBatch, Side, View
from .log_domain import cross_entropy


class ClipLoss(ContrastiveLoss):
    """Symmetric cross-entropy between images and texts (CLIP, arXiv:2103.00020), in O(batch) memory.

    With S_ij = logit_scale <image_i, text_j>, the term of pair i is the weighted sum of its two cross-entropies,

        w_it * -log softmax_j(S_ij)[i] + w_ti * -log softmax_j(S_ji)[i],

    and the loss is the terms' mean over the whole batch. Each cross-entropy is computed as
    softplus(log sum_{j != i} exp(S_ij) - S_ii), which does not cancel when pairs are well aligned. The logits
    are never stored; `pairtile.kernels.similarity_reduce` and its kin sweep them in tiles.

    A drop-in for open_clip's class of this name: the same constructor and forward. On several ranks each passes
    its own shard, of any size, also an empty one. The value is the loss of the whole batch on every rank and
    the gradient is exact: its mean over ranks, which DDP and DeepSpeed take, is the gradient that a single
    process computes on the whole batch.

    Args:
        local_loss: return this rank's share L_r, whose mean over ranks is the loss, instead of the loss itself;
            the gradient is the same.
        gather_with_grad: accepted and without effect: the gradient is always exact.
        cache_labels: accepted and without effect: there are no labels to cache.
        rank: this process, if world_size > 1.
        world_size: above 1 the batch is spread over the default process group.
        use_horovod: refused when world_size > 1; the exchange is torch.distributed's.
        group: process group to use instead of the default one; rank and world_size may then be left out.
        strategy: "gather": every rank holds all features during the loss; "ring": its own and two passing shards.
        scope, wire_dtype, node_size: as in `ContrastiveLoss`.
        reduction: "mean", "sum" (both over the whole batch), or "none": the terms of this rank's pairs.
        label_smoothing: eps, as in `F.cross_entropy(label_smoothing=eps)`, to which it is equal: each
            cross-entropy gains eps (S_ii - mean_j S_ij), the mean over all its columns. Costs O(batch), no sweep.
        direction_weights: (w_it, w_ti), image to text and text to image. A direction of weight 0 is not computed.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
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
        label_smoothing: float = 0.0,
        direction_weights: tuple[float, float] = (0.5, 0.5),
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
        if use_horovod and world_size > 1:
            raise ValueError("use_horovod=True: the exchange is torch.distributed's; initialise that instead")
        if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing!r}: expected a number from 0 to 1")
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.use_horovod = use_horovod
        self.label_smoothing = float(label_smoothing)
        self.direction_weights = checked_weights(direction_weights)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        negative_text_features: Tensor | None = None,
        negative_image_features: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], normalised as the model defines it; any floating dtype.
            text_features: [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            logit_bias: accepted for drop-in use; a softmax does not depend on it and its gradient is 0.
            output_dict: return {"contrastive_loss": loss}.
            negative_text_features: [K, D]: texts that belong to no image, more columns of the image to text
                direction (the hard negatives of NegCLIP, arXiv:2210.01936; a queue). With several ranks those of
                all ranks, whose numbers may differ; all pass a tensor or none does.
            negative_image_features: [K', D], the same for text to image.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        if negative_text_features is not None:
            check_matrix("negative_text_features", negative_text_features, width=image_features.shape[1])
        if negative_image_features is not None:
            check_matrix("negative_image_features", negative_image_features, width=image_features.shape[1])
        loss = self._loss(
            image_features, text_features, logit_scale, logit_bias, negative_text_features, negative_image_features
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self,
        images: Tensor,
        texts: Tensor,
        scale: float | Tensor,
        bias: float | Tensor | None = None,
        negative_texts: Tensor | None = None,
        negative_images: Tensor | None = None,
    ) -> Tensor:
        check_scalar("logit_scale", scale)
        check_scalar("logit_bias", bias)
        exchange = self._exchange()
        if exchange is not None and exchange.strategy == "ring":
            return self._in_ring(exchange, images, texts, scale, bias, negative_texts, negative_images)
        image_to_text, text_to_image = self.direction_weights
        of_images = (texts, negative_texts) if image_to_text else (None, None)
        of_texts = (images, negative_images) if text_to_image else (None, None)
        batch, (y, y_negative, x, x_negative) = gather(
            *of_images, *of_texts, group=None if exchange is None else exchange.group, wire_dtype=self.wire_dtype
        )
        if x is not None and y is not None and batch.group is None and (x_negative is None or y_negative is None):
            # Both directions in one sweep. What is negative belongs to no pair, so that its own term is 0.
            sweeps = [_Sweep(_joined(x, x_negative), _joined(y, y_negative), image_to_text, text_to_image)]
        else:
            sweeps = [_Sweep(images, _joined(y, y_negative), image_to_text)] if y is not None else []
            sweeps += [_Sweep(texts, _joined(x, x_negative), text_to_image)] if x is not None else []
        shares = [self._share(sweep, scale, batch) for sweep in sweeps]
        total = shares[0] if len(shares) == 1 else shares[0] + shares[1]
        return self._finish(_with_bias(total, bias), batch)

    def _in_ring(
        self,
        exchange: Exchange,
        images: Tensor,
        texts: Tensor,
        scale: float | Tensor,
        bias: float | Tensor | None,
        negative_texts: Tensor | None,
        negative_images: Tensor | None,
    ) -> Tensor:
        extra = [None if each is None else Side(each) for each in (negative_images, negative_texts)]
        batch = PairBatch(Side(images), Side(texts), exchange, (), *extra)
        rows, cols = (others_and_own if weight else None for weight in self.direction_weights)
        reduced = batch.reduce(scale=scale, rows=rows, cols=cols)
        directions = zip(self.direction_weights, reduced, strict=True)
        terms = torch.stack([weight * cross_entropy(*results) for weight, results in directions if weight]).sum(0)
        if self.label_smoothing:
            terms = terms + self.label_smoothing * self._smoothing(batch, negative_texts, negative_images, scale)
        return self._finish(_with_bias(terms, bias), batch.shards)

    def _smoothing(
        self, batch: PairBatch, negative_texts: Tensor | None, negative_images: Tensor | None, scale: float | Tensor
    ) -> Tensor:
        """[n]: S_ii - mean_j S_ij of this rank's rows, and the same of its columns, weighted."""
        x, y = batch.x.features, batch.y.features
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        means = _mean_of_all(y, negative_texts, batch, dtype), _mean_of_all(x, negative_images, batch, dtype)
        x, y = x.to(dtype), y.to(dtype)
        image_to_text, text_to_image = self.direction_weights
        cosines = image_to_text * (x * (y - means[0])).sum(-1) + text_to_image * (y * (x - means[1])).sum(-1)
        return cosines * (scale.reshape(()) if isinstance(scale, Tensor) else scale)

    def _share(self, sweep: _Sweep, scale: float | Tensor, batch: Shards) -> Tensor:
        """This rank's terms, [n]; or their sum, with the batch's weight, where the reduction is one."""
        n, pair = batch.sizes[batch.rank], Diagonal(batch.start)
        x, y, row_weight, col_weight = sweep
        if self.reduction == "none":
            by_row, by_col = cross_entropies(x, y, scale=scale, pair=pair, rows=row_weight != 0, cols=col_weight != 0)
            weighted = ((row_weight, by_row), (col_weight, by_col))
            share = torch.stack([weight * terms[:n] for weight, terms in weighted if terms is not None]).sum(0)
            return share + self.label_smoothing * sweep.smoothing(scale, batch) if self.label_smoothing else share
        inside, outside = self._weights(batch)
        share = cross_entropy_sum(
            x, y, scale=scale, pair=pair, row_weight=inside * row_weight, col_weight=inside * col_weight
        )
        if self.label_smoothing:
            share = share + inside * self.label_smoothing * sweep.smoothing(scale, batch).sum()
        return share if outside == 1 else share * outside


class _Sweep(NamedTuple):
    """One pass over the scores of x and y. This rank's features come first in x, and in y at the batch's start."""

    x: Tensor
    y: Tensor
    row_weight: float
    col_weight: float = 0.0

    def smoothing(self, scale: float | Tensor, batch: Shards) -> Tensor:
        """[n]: S_ii - mean_j S_ij of this rank's rows, and the same of its columns, weighted."""
        # A mean of scores is the score of the mean. In float32 at least, as all statistics are.
        dtype = torch.promote_types(torch.promote_types(self.x.dtype, self.y.dtype), torch.float32)
        x, y = self.x.to(dtype), self.y.to(dtype)
        n, start = batch.sizes[batch.rank], batch.start
        own, partner = x[:n], y[start : start + n]
        cosines = self.row_weight * (own * (partner - y.mean(0))).sum(-1)
        if self.col_weight:
            cosines = cosines + self.col_weight * (partner * (own - x.mean(0))).sum(-1)
        return cosines * (scale.reshape(()) if isinstance(scale, Tensor) else scale)


def others_and_own(view: View) -> tuple[Reduction, ...]:
    """What the cross-entropy of an owner is made of."""
    return LogSumExp(exclude=view.own), PairScore(view.own)


def _mean_of_all(features: Tensor, negatives: Tensor | None, batch: PairBatch, dtype: torch.dtype) -> Tensor:
    """[D]: the mean of all ranks' rows of both."""
    joined = _joined(features, negatives).to(dtype)
    total = gather_counts(len(joined), device=joined.device, group=batch.group).total
    _, (sums,) = gather(joined.sum(0, keepdim=True), group=batch.group)
    return sums.sum(0) / max(1, total)


def _with_bias(total: Tensor, bias: float | Tensor | None) -> Tensor:
    if isinstance(bias, Tensor) and bias.requires_grad:
        # Exactly 0, yet part of the graph: DDP waits for a gradient of every parameter.
        return total + 0 * bias.reshape(()).to(total.dtype)
    return total


def _joined(features: Tensor, negatives: Tensor | None) -> Tensor:
    return features if negatives is None else torch.cat([features, negatives])


def checked_weights(weights: tuple[float, float]) -> tuple[float, float]:
    """A loss's `direction_weights`, or an error that says what they should be."""
    try:
        first, second = (float(weight) for weight in weights)
    except (TypeError, ValueError):
        first = second = math.nan
    if not (0 <= first < math.inf and 0 <= second < math.inf and first + second > 0):
        raise ValueError(
            f"direction_weights={weights!r}: expected two numbers of at least 0, not both 0 (image to text, text to "
            "image)"
        )
    return first, second
