"""The losses of CoCa: contrast and caption."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..distributed import gather_counts
from .base import check_pairs
from .clip import ClipLoss
from .linear_cross_entropy import linear_cross_entropy


class CoCaLoss(ClipLoss):
    """Contrastive and captioning loss (CoCa, arXiv:2205.01917): two terms, each with its weight.

    The contrastive term is `ClipLoss`. The caption term is the cross-entropy of the decoder's next token,
    -log softmax_v(<hidden_t, vocab_v>)[label_t], in the mean over all tokens of the batch that are not padding.
    Given the decoder's last hidden states and its output matrix it needs no logits: [batch, length, vocabulary]
    is by far the largest tensor of the step. The paper weighs captions 2 and contrast 1.

    A drop-in for open_clip's class of this name: the same constructor, and the same forward, which may also be
    called with hidden states. On several ranks value and gradient of both terms are those of the whole batch;
    the caption term is then the mean over all ranks' tokens, however many each has (open_clip averages the ranks'
    means).

    Args:
        caption_loss_weight: factor of the caption term.
        clip_loss_weight: factor of the contrastive term; at 0 it is not computed.
        pad_id: the label of tokens without a loss.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in `ClipLoss`.
        group, strategy, label_smoothing, direction_weights: as in `ClipLoss`, for the contrastive term.
        reduction: "mean", "sum", or "none": this rank's pairs [batch] and this rank's tokens [batch, length].

    Raises:
        ValueError: as `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
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
            label_smoothing=label_smoothing,
            direction_weights=direction_weights,
        )
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.pad_id = pad_id

    def forward(  # type: ignore[override]  # open_clip's CoCaLoss overrides the signature of its ClipLoss too
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor | None,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
        *,
        hidden_states: Tensor | None = None,
        vocab_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both terms of a batch: image i belongs to text i, whose tokens are row i of the labels.

        Args:
            image_features: [batch, D], as in `ClipLoss`. Not looked at if clip_loss_weight is 0, like the next.
            text_features: [batch, D].
            logits: [batch, length, V] of the decoder; None, or not looked at, if the last two are given.
            labels: [batch, length], int64: for each position the token that follows, or `pad_id`.
            logit_scale: a float or a tensor of shape [] or [1].
            output_dict: return {"contrastive_loss": ..., "caption_loss": ...}.
            hidden_states: [batch, length, width], what the decoder multiplies with its output matrix.
            vocab_weight: [V, width], that matrix (of open_clip's CoCa: `text_decoder.text_projection.T`).

        Returns:
            (contrastive loss, caption loss), each times its weight.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, or neither logits nor the last two.
        """
        if (hidden_states is None) != (vocab_weight is None) or (logits is None and hidden_states is None):
            raise ValueError("CoCaLoss needs either logits, or both hidden_states and vocab_weight")
        if self.clip_loss_weight:
            check_pairs(image_features, text_features)
            clip_loss = self.clip_loss_weight * self._loss(image_features, text_features, logit_scale)
        else:
            clip_loss = torch.tensor(0, device=labels.device)
        caption_loss = self.caption_loss_weight * self._caption_loss(logits, labels, hidden_states, vocab_weight)
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss

    def _caption_loss(
        self, logits: Tensor | None, labels: Tensor, hidden_states: Tensor | None, vocab_weight: Tensor | None
    ) -> Tensor:
        group = self._group()
        here = group is None or self.reduction == "none"
        # Several ranks need this rank's sum: a mean of tokens would have to know how many the others have.
        reduction = self.reduction if here else "sum"
        if hidden_states is not None and vocab_weight is not None:
            loss = linear_cross_entropy(
                hidden_states, vocab_weight, labels, ignore_index=self.pad_id, reduction=reduction
            )
        else:
            assert logits is not None
            loss = _from_logits(logits, labels, self.pad_id, reduction)
        if here:
            return loss
        tokens = gather_counts(int((labels != self.pad_id).sum()), device=labels.device, group=group)
        return self._finish(loss * tokens.weight(self.reduction), tokens)


def _from_logits(logits: Tensor, labels: Tensor, pad_id: int, reduction: str) -> Tensor:
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} do not fit: expected [batch, length, "
            "vocabulary] and [batch, length]"
        )
    # A sum over a batch overflows in float16.
    dtype = torch.promote_types(logits.dtype, torch.float32) if reduction == "sum" else logits.dtype
    return F.cross_entropy(logits.permute(0, 2, 1).to(dtype), labels, ignore_index=pad_id, reduction=reduction)
