"""Contrastive attraction and contrastive repulsion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..contrastive import Reduction, SoftmaxMean
from ..contrastive.arguments import check_indices
from .base import check_pairs
from .batch import PairBatch, Side, View
from .two_way import Options, TwoWayLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CACRLoss(TwoWayLoss):
    """Contrastive attraction and contrastive repulsion (CACR, arXiv:2105.03746).

    With the squared distances d_ij = |x_i - y_j|^2, positives compete among themselves, far ones counting more, and
    negatives among themselves, close ones counting more. The term of row i is

        alpha sum_{k in P_i} softmax_{k in P_i}(tau_pos d_ik) d_ik - beta sum_{j not in P_i} softmax_{j not in P_i}(-tau_neg d_ij) d_ij,

    that of column j the same along the columns; P_i is i itself, or, given ids, all with the id of i: several views
    of one image on both sides. The gradient goes through the weights too. A row without negatives has no repulsion.
    It may be negative. Expects unit vectors, as the paper has, but takes any.

    Args:
        tau_pos, tau_neg: how sharply the far positives and the close negatives are preferred.
        alpha, beta: factors of attraction and repulsion.
        direction_weights: (x queries y, y queries x). A direction of weight 0 is not computed.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
    """

    def __init__(
        self,
        *,
        tau_pos: float = 1.0,
        tau_neg: float = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        direction_weights: tuple[float, float] = (0.5, 0.5),
        **options: Unpack[Options],
    ) -> None:
        super().__init__(direction_weights=direction_weights, **options)
        for name, value in (("tau_pos", tau_pos), ("tau_neg", tau_neg), ("alpha", alpha), ("beta", beta)):
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: expected a number of at least 0")
        self.tau_pos = float(tau_pos)
        self.tau_neg = float(tau_neg)
        self.alpha = float(alpha)
        self.beta = float(beta)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        ids: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: x_i and y_i are views of one thing, or its image and its text.

        Args:
            image_features: x [batch, D]; any floating dtype.
            text_features: y [batch, D].
            ids: int64 [batch], what pair i is a view of: pairs of equal ids are positives of each other. None: of itself
                alone.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        if ids is not None:
            check_indices(ids, "ids", image_features.shape[0], "pair", image_features.device)
        batch = PairBatch(Side(image_features, ids), Side(text_features, ids), self._group())
        own_distance = squared_distances(image_features, text_features) if ids is None else None

        def asked(view: View) -> list[Reduction]:
            if own_distance is not None:
                return [SoftmaxMean(sharpness=-self.tau_neg, exclude=view.own)]
            return [
                SoftmaxMean(sharpness=-self.tau_neg, exclude=view.same),
                SoftmaxMean(sharpness=self.tau_pos, exclude=view.different),
            ]

        def formula(results: tuple[Tensor, ...]) -> Tensor:
            negative, *positive = results
            return self.alpha * (positive[0] if positive else own_distance) - self.beta * negative

        # S_ij = |x_i|^2 + |y_j|^2 - 2 <x_i, y_j>
        reduced = self._reduce(
            batch, asked, scale=-2.0, biases_of=lambda view: (squared_norms(view.x), squared_norms(view.y))
        )
        loss = self._finish(self._terms(formula, *reduced), batch.shards)
        return {"contrastive_loss": loss} if output_dict else loss


def squared_norms(features: Tensor) -> Tensor:
    """|x_i|^2, [n], in float32 at least."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return wide.square().sum(-1)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_i|^2, [n], in float32 at least: of what differs by little, 16 bits would leave nothing."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return squared_norms(x.to(dtype) - y.to(dtype))
