"""The loss of FILIP."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..late_interaction import filip_similarity
from .base import ContrastiveLoss
from .clip import ClipLoss, checked_weights
from .over_scores import over_scores


class FilipLoss(ContrastiveLoss):
    """Cross-entropy of token-wise maximum similarities, each direction over its own matrix (FILIP, arXiv:2111.07783).

    With s_I(i, j) = mean_{p in image i} max_{r in text j} <p, r> and s_T(i, j) = mean_{r in text j} max_{p in image i} <p, r>,

        w_it * -log softmax_j(scale s_I(i, .))[i] + w_ti * -log softmax_j(scale s_T(., i))[i],

    and the loss is the mean over the batch. Neither the tensor of all token products nor its gradient is stored.

    Args:
        direction_weights: (w_it, w_ti).
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.
    """

    def __init__(self, *, direction_weights: tuple[float, float] = (0.5, 0.5), **options: Any) -> None:
        super().__init__(**options)
        self.direction_weights = checked_weights(direction_weights)
        self._of_scores = ClipLoss(direction_weights=self.direction_weights, reduction=self.reduction)

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        logit_scale: float | Tensor,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_tokens: [batch, Li, D], unit vectors where similarities are to be cosines; any floating dtype.
            text_tokens: [batch, Lt, D].
            logit_scale: the factor itself, a float or a tensor of shape [] or [1].
            image_mask, text_mask: bool [batch, Li] and [batch, Lt], True for tokens that count; None: all.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 tokens); [batch] for reduction="none".
        """
        of_images, of_texts = filip_similarity(image_tokens, text_tokens, image_mask, text_mask)
        loss = over_scores(self._of_scores, of_images, of_texts, logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss
