"""The loss of CLIP."""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..contrastive import Diagonal, LogSumExp, PairScore, similarity_reduce
from ..distributed import Shards, gather_rows
from .base import ContrastiveLoss


class ClipLoss(ContrastiveLoss):
    """Symmetric cross-entropy between images and texts (CLIP, arXiv:2103.00020), in O(batch) memory.

    With S_ij = logit_scale <image_i, text_j>, the term of pair i is the mean of its two cross-entropies,

        (-log softmax_j(S_ij)[i] - log softmax_j(S_ji)[i]) / 2,

    and the loss is their mean over the whole batch. Each cross-entropy is computed as
    softplus(log sum_{j != i} exp(S_ij) - S_ii), which does not cancel when pairs are well aligned. The logits
    are never stored; `pairtile.kernels.similarity_reduce` sweeps them in tiles.

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
        strategy: "gather": every rank holds all features during the loss.
        reduction: "mean", "sum" (both over the whole batch), or "none": the terms of this rank's pairs.

    Raises:
        ValueError: options that this version does not have.
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
    ) -> None:
        super().__init__(
            rank=rank, world_size=world_size, local_loss=local_loss, group=group, strategy=strategy, reduction=reduction
        )
        if use_horovod and world_size > 1:
            raise ValueError("use_horovod=True: the exchange is torch.distributed's; initialise that instead")
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], normalised as the model defines it; any floating dtype.
            text_features: [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            logit_bias: accepted for drop-in use; a softmax does not depend on it and its gradient is 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        shards = self._shards(image_features, text_features, image_features, text_features)
        terms = _cross_entropies(image_features, text_features, logit_scale, shards)
        if isinstance(logit_bias, Tensor):
            # Exactly 0, yet part of the graph: DDP waits for a gradient of every parameter.
            terms = terms + 0 * logit_bias.reshape(())
        return self._finish(terms, shards, output_dict)


def _cross_entropies(images: Tensor, texts: Tensor, scale: float | Tensor, shards: Shards) -> Tensor:
    """[n]: for each of this rank's pairs, the mean of its two cross-entropies over the whole batch."""
    own = Diagonal(shards.start)
    asked = (LogSumExp(exclude=own), PairScore(own))
    if shards.world_size == 1:
        by_image, by_text = similarity_reduce(images, texts, scale=scale, rows=asked, cols=asked)
    else:
        all_images, all_texts = gather_rows(shards, images, texts)
        by_image, _ = similarity_reduce(images, all_texts, scale=scale, rows=asked)
        by_text, _ = similarity_reduce(texts, all_images, scale=scale, rows=asked)
    return (_cross_entropy(*by_image) + _cross_entropy(*by_text)) / 2


def _cross_entropy(others: Tensor, own: Tensor) -> Tensor:
    # F.softplus turns linear above a threshold, with a relative error of 1e-10 that float64 would show. The last
    # term is 0, or NaN where the pair's score is infinite: softplus(-inf) = 0 would hide that.
    return -F.logsigmoid(own - others) + 0 * own
