"""Losses whose terms are those of the rows and those of the columns of one similarity matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .base import ContrastiveLoss, checked_direction_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .batch import Ask, PairBatch


class Options(TypedDict, total=False):
    """The options of every loss, as `ContrastiveLoss` takes them."""

    rank: int
    world_size: int
    local_loss: bool
    group: dist.ProcessGroup | None
    strategy: str
    reduction: str


class TwoWayLoss(ContrastiveLoss):
    """A loss whose term of pair i is the weighted sum of one of its row and one of its column.

    Args:
        direction_weights: (w_it, w_ti), image to text (the rows) and text to image (the columns). A direction of
            weight 0 is not computed.
        options: rank, world_size, local_loss, group, strategy, reduction.
    """

    def __init__(self, *, direction_weights: tuple[float, float] = (0.5, 0.5), **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.direction_weights = checked_direction_weights(direction_weights)

    def _reduce(
        self, batch: PairBatch, ask: Ask, *, scale: float | Tensor, **options: Any
    ) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """What is asked of both directions; None for one of weight 0."""
        rows, cols = (ask if weight else None for weight in self.direction_weights)
        of_rows, of_cols = batch.reduce(scale=scale, rows=rows, cols=cols, **options)
        return of_rows if rows else None, of_cols if cols else None

    def _weighted(self, *terms: Tensor | None) -> Tensor:
        """[n]: the terms of rows and of columns, either None, with the directions' weights."""
        weighted = [
            weight * each for weight, each in zip(self.direction_weights, terms, strict=True) if each is not None
        ]
        return weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]

    def _terms(
        self,
        formula: Callable[[tuple[Tensor, ...]], Tensor],
        of_rows: tuple[Tensor, ...] | None,
        of_cols: tuple[Tensor, ...] | None,
    ) -> Tensor:
        """[n]: a formula that is the same in both directions, of what was reduced."""
        return self._weighted(*(None if results is None else formula(results) for results in (of_rows, of_cols)))


def cross_entropy(others: Tensor, own: Tensor) -> Tensor:
    """-log softmax of each owner's pair, of the log-sum-exp over all other pairs and the pair's score."""
    # The last term is 0, or NaN where the pair's score is infinite: softplus(-inf) = 0 would hide that.
    return -F.logsigmoid(own - others) + 0 * own
