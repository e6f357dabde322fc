"""Positives by id: what can be said of them without visiting a tile."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive import Diagonal
from ..contrastive.arguments import DEFAULT_MEMORY_BUDGET, check_indices
from ..contrastive.compiled import traced_pair_scores
from ..contrastive.operands import Operands, pair_scores
from .base import check_matrix


def paired_ids(
    image_features: Tensor, text_features: Tensor, image_ids: Tensor | None, text_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ids of both sides, checked; those of one side serve the other where only they are given.

    Raises:
        ValueError, TypeError: features or ids of a wrong shape, dtype or device.
    """
    check_matrix("image_features", image_features)
    check_matrix("text_features", text_features, width=image_features.shape[1])
    of_images = text_ids if image_ids is None else image_ids
    of_texts = image_ids if text_ids is None else text_ids
    n, m = image_features.shape[0], text_features.shape[0]
    if of_images is None or of_texts is None or (n != m and (image_ids is None or text_ids is None)):
        raise ValueError(
            f"{n} images and {m} texts with image_ids={_given(image_ids)}, text_ids={_given(text_ids)}: pass both, or "
            "one of them where image i belongs to text i"
        )
    check_indices(of_images, "image_ids", n, "image", image_features.device)
    check_indices(of_texts, "text_ids", m, "text", image_features.device)
    return of_images, of_texts


def _given(ids: Tensor | None) -> str:
    return "None" if ids is None else "a tensor"


class ById:
    """Sums, for each owner, over the candidates whose id is the owner's.

    Everything has the length of the owners or of the candidates, so that nothing waits for the device.

    Args:
        owner_ids: int64 [n].
        ids: int64 [M], of the candidates.
    """

    def __init__(self, owner_ids: Tensor, ids: Tensor) -> None:
        ordered, none = ids.sort().values, len(ids)
        # Each id adds up in one slot, the first place that it has in order; behind them is one that stays empty.
        self._slots = torch.searchsorted(ordered, ids)
        at = torch.searchsorted(ordered, owner_ids)
        found = (at < none) & (F.pad(ordered, (0, 1))[at] == owner_ids)
        self._at = at.masked_fill(~found, none)

    def sum(self, values: Tensor) -> Tensor:
        """[M, ...] -> [n, ...], 0 for an owner without candidates."""
        totals = values.new_zeros(len(self._slots) + 1, *values.shape[1:])
        return totals.index_add(0, self._slots, values)[self._at]

    def counts(self) -> Tensor:
        """int64 [n]: how many candidates each owner has."""
        return self.sum(torch.ones_like(self._slots))

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """log of the sum of exp(values): [M] -> [n], -inf for an owner without candidates."""
        peaks = values.new_full((len(self._slots) + 1,), -torch.inf)
        peaks = peaks.scatter_reduce(0, self._slots, values.detach(), "amax")
        peaks = peaks.masked_fill(peaks.isneginf(), 0)
        total = self.sum((values - peaks[self._slots]).exp())
        empty = total == 0
        return (total.masked_fill(empty, 1).log() + peaks[self._at]).masked_fill(empty, -torch.inf)


def row_scores(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """scale * <x_i, y_i>, [n] in the dtype of scale: taken in float64 and rounded once, as `PairScore` takes it.

    Args:
        x, y: [n, D], each of any floating dtype.
        scale: of shape [].
    """
    scores: Tensor = _RowScores.apply(x, y, scale)
    return scores


class _RowScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        exact = traced_pair_scores if torch.compiler.is_compiling() else pair_scores
        operands = Operands(x, y, torch.ones_like(scale), None, None, None).detached()
        products = exact(operands, Diagonal(), 1, DEFAULT_MEMORY_BUDGET, 0.0)
        ctx.save_for_backward(x, y, scale, products.to(scale.dtype))
        return (products * scale).to(scale.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, scale, products = ctx.saved_tensors
        weights = (scale * grad).unsqueeze(1)
        return (weights * y).to(x.dtype), (weights * x).to(y.dtype), (grad * products).sum()
