"""What losses of two directions share: the directions' weights, and the sum of their terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .base import ContrastiveLoss
from .batch import Ask, PairBatch
from .clip import checked_weights


class TwoDirectionLoss(ContrastiveLoss):
    """A loss with one term for each image (image to text) and one for each text (text to image).

    Args:
        direction_weights: (w_it, w_ti), factors of the images' and of the texts' terms. A direction of weight 0 is not
            computed.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.
    """

    def __init__(self, *, direction_weights: tuple[float, float] = (0.5, 0.5), **options: Any) -> None:
        super().__init__(**options)
        self.direction_weights = checked_weights(direction_weights)

    def _reduced(self, batch: PairBatch, ask: Ask, **given: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """`batch.reduce` where both directions ask the same; nothing of one that has weight 0."""
        image_to_text, text_to_image = self.direction_weights
        return batch.reduce(rows=ask if image_to_text else None, cols=ask if text_to_image else None, **given)

    def _each(
        self, formula: Callable[..., Tensor], reduced: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    ) -> tuple[Tensor | None, Tensor | None]:
        """formula(*results) of the rows and of the columns; None for a direction of weight 0."""
        of_images, of_texts = (
            formula(*results) if weight else None
            for weight, results in zip(self.direction_weights, reduced, strict=True)
        )
        return of_images, of_texts

    def _combined(self, of_images: Tensor | None, of_texts: Tensor | None, batch: PairBatch) -> Tensor:
        """The loss from the terms of this rank's images [n] and texts [m]; None for a direction of weight 0.

        Each direction is a mean (or sum) over its own owners, which are not equally many where an image has several
        texts.
        """
        directions = zip((of_images, of_texts), self.direction_weights, (batch.shards, batch.y_shards), strict=True)
        weighted = [(weight * terms, shards) for terms, weight, shards in directions if terms is not None]
        if self.reduction == "none":
            return self._finish(_added([terms for terms, _ in weighted]), batch.shards)
        shares = [terms.sum() * shards.weight(self.reduction) for terms, shards in weighted]
        return self._finish(_added(shares), batch.shards)


def _added(parts: list[Tensor]) -> Tensor:
    if parts[0].shape != parts[-1].shape:
        raise ValueError(
            f'reduction="none" with {parts[0].shape[0]} images and {parts[-1].shape[0]} texts: their terms cannot be '
            "added; give one of the two directions the weight 0"
        )
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
