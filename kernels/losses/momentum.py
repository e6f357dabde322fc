"""The image-text contrastive loss of ALBEF: momentum targets, and queues of negatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..contrastive import Diagonal, Teacher, similarity_reduce
from ..contrastive.arguments import factor
from ..contrastive.row_blocks import row_terms
from ..distributed import Exchange, gather
from .base import check_matrix, check_pairs, check_scalar
from .batch import PairBatch, Side, View
from .positives import row_scores
from .soft_target import SoftTargetLoss, soft_cross_entropy, soft_targets


class MomentumDistillationLoss(SoftTargetLoss):
    """Contrast with a momentum encoder's keys, against its own softmax (ALBEF, arXiv:2107.07651).

    The candidates of an image are the texts as the momentum encoder embeds them, u_j, those of the batch and then those
    of a queue; y the targets, T the momentum encoder's own similarities at the same temperature:

        S_ij = logit_scale <image_i, u_j>,  T_ij = logit_scale <momentum_image_i, u_j>,
        -sum_j y_ij log softmax_j(S_ij),    y_ij = alpha softmax_j(T_ij) + (1 - alpha) [i = j],

    and the same for texts among momentum images. Gradients go to the batch's own embeddings and to the scale in S
    alone. On several ranks the momentum features of all ranks are candidates, as of one process with the whole batch;
    the authors' code has this rank's beside the queue.

    Args:
        alpha: weight of the momentum targets; the authors raise it from 0 to 0.4 in the first epoch, for which it is a
            plain attribute. At 0 this is the contrastive loss of MoCo with both modalities.
        direction_weights: (image to text, text to image). A direction of weight 0 is not computed.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.4,
        direction_weights: tuple[float, float] = (0.5, 0.5),
        **options: Any,
    ) -> None:
        super().__init__(alpha=alpha, direction_weights=direction_weights, **options)

    def forward(  # type: ignore[override]  # candidates besides the batch
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        momentum_image_features: Tensor,
        momentum_text_features: Tensor,
        image_queue: Tensor | None = None,
        text_queue: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], normalised as the model defines it; any floating dtype.
            text_features: [batch, D].
            logit_scale: the factor itself, 1 / temperature; a float or a tensor of shape [] or [1].
            momentum_image_features: [batch, D], of the same images by the momentum encoder.
            momentum_text_features: [batch, D].
            image_queue: [Q, D], momentum features of earlier images, which belong to no text; None: none. The same
                on every rank, as what all ranks gather before they enqueue.
            text_queue: [Q', D], the same of texts.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        momentum = {
            "momentum_image_features": momentum_image_features,
            "momentum_text_features": momentum_text_features,
        }
        for name, features in momentum.items():
            check_matrix(name, features)
            if features.shape != image_features.shape:
                raise ValueError(
                    f"{name} has shape {list(features.shape)}: expected that of the batch, {list(image_features.shape)}"
                )
        for name, queue in (("image_queue", image_queue), ("text_queue", text_queue)):
            if queue is not None:
                check_matrix(name, queue, width=image_features.shape[1])
        image_keys, text_keys = (features.detach() for features in momentum.values())
        exchange = self._exchange()
        if exchange is not None and exchange.strategy == "ring":
            keys = (
                (image_features, image_keys, text_keys, text_queue),
                (text_features, text_keys, image_keys, image_queue),
            )
            loss = self._in_ring(exchange, keys, logit_scale)
            return {"contrastive_loss": loss} if output_dict else loss
        batch, (all_image_keys, all_text_keys) = gather(
            image_keys, text_keys, group=self._group(), wire_dtype=self.wire_dtype
        )
        dtype = torch.promote_types(torch.promote_types(image_keys.dtype, text_keys.dtype), torch.float32)
        with torch.no_grad():
            teacher_own = row_scores(
                image_keys, text_keys, factor(logit_scale, "logit_scale", dtype, image_keys.device)
            )

        def terms_of(queries: Tensor, query_keys: Tensor, keys: Tensor, queue: Tensor | None) -> Tensor:
            candidates = keys if queue is None else torch.cat([keys, queue.detach()])

            def formula(x: Tensor, scale: float | Tensor, rows: slice) -> Tensor:
                start = batch.start + rows.start
                teacher = Teacher(query_keys[rows], candidates, logit_scale)
                view = View(x, candidates, start, Diagonal(start), teachers=(teacher,))
                results, _ = similarity_reduce(view.x, view.y, scale=scale, rows=soft_targets(view))
                one_hot, gap = soft_cross_entropy(results, [teacher_own[rows]])
                return one_hot + self.alpha * gap

            return row_terms(formula, queries, logit_scale, columns=len(candidates), similarities=2)

        directions = (
            (image_features, image_keys, all_text_keys, text_queue),
            (text_features, text_keys, all_image_keys, image_queue),
        )
        terms = [
            weight * terms_of(*each) for weight, each in zip(self.direction_weights, directions, strict=True) if weight
        ]
        loss = self._finish(torch.stack(terms).sum(0), batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _in_ring(
        self,
        exchange: Exchange,
        directions: tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], ...],
        scale: float | Tensor,
    ) -> Tensor:
        """Of (queries, their keys, the other modality's keys, its queue) of each direction."""
        terms: list[Tensor] = []
        for weight, (queries, query_keys, keys, queue) in zip(self.direction_weights, directions, strict=True):
            if not weight:
                continue
            extra = None
            if queue is not None:
                # All ranks have the same queue: each lends its share.
                share = queue.detach().tensor_split(dist.get_world_size(exchange.group))[dist.get_rank(exchange.group)]
                extra = Side(share, taught=[share])
            sides = Side(queries, taught=[query_keys]), Side(keys, taught=[keys])
            batch = PairBatch(*sides, exchange, [scale], y_extra=extra)
            results, _ = batch.reduce(scale=scale, rows=soft_targets)
            one_hot, gap = soft_cross_entropy(results, batch.teacher_scores())
            terms.append(weight * (one_hot + self.alpha * gap))
        return self._finish(torch.stack(terms).sum(0), batch.shards)
