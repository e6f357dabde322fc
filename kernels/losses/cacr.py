"""Contrastive attraction and contrastive repulsion."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..contrastive import Reduction, SoftmaxMean
from .base import check_pairs
from .batch import PairBatch, Side, View
from .directions import TwoDirectionLoss
from .positives import paired_ids


class CACRLoss(TwoDirectionLoss):
    """Contrastive attraction and contrastive repulsion (CACR, arXiv:2105.03746).

    With the squared distances d_ij = |x_i - y_j|^2, positives compete among themselves, far ones counting more, and
    negatives among themselves, close ones counting more. The term of row i is

        alpha sum_{k in P_i} softmax_{k in P_i}(tau_pos d_ik) d_ik - beta sum_{j not in P_i} softmax_{j not in P_i}(-tau_neg d_ij) d_ij,

    that of column j the same along the columns; P_i is i itself, or, given ids, all y with the id of x_i: any number of
    views of one image on either side. The gradient goes through the weights too. What has no positives has no
    attraction, and what has no negatives no repulsion. It may be negative. The paper's vectors are of unit length; any
    are taken.

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
        **options: Any,
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
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch.

        Args:
            image_features: x [n, D]; any floating dtype. Another view of y as well as another modality.
            text_features: y [m, D].
            output_dict: return {"contrastive_loss": loss}.
            image_ids: int64 [n], of one meaning on all ranks: what x_i is a view of. All ranks pass ids or none does.
                Without any, x_i belongs to y_i alone.
            text_ids: int64 [m]. Where x_i belongs to y_i one of the two serves both.

        Returns:
            A scalar in float32 (float64 for float64 features); [n] for reduction="none", which needs n = m or one
            direction alone.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        if image_ids is None and text_ids is None:
            check_pairs(image_features, text_features)
            ask, attraction = self._ask_by_position, [squared_distances(image_features, text_features)]
        else:
            image_ids, text_ids = paired_ids(image_features, text_features, image_ids, text_ids)
            ask, attraction = self._ask_by_id, []
        batch = PairBatch(Side(image_features, image_ids), Side(text_features, text_ids), self._exchange())
        # S_ij = |x_i|^2 + |y_j|^2 - 2 <x_i, y_j>
        reduced = self._reduced(batch, ask, scale=-2.0, biases_of=_norms)

        def formula(repulsion: Tensor, *by_id: Tensor) -> Tensor:
            return self.alpha * (*by_id, *attraction)[0] - self.beta * repulsion

        loss = self._combined(*self._each(formula, reduced), batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _ask_by_position(self, view: View) -> list[Reduction]:
        return [SoftmaxMean(sharpness=-self.tau_neg, exclude=view.own)]

    def _ask_by_id(self, view: View) -> list[Reduction]:
        return [
            SoftmaxMean(sharpness=-self.tau_neg, exclude=view.same),
            SoftmaxMean(sharpness=self.tau_pos, exclude=view.different),
        ]


def _norms(view: View) -> tuple[Tensor, Tensor]:
    return squared_norms(view.x), squared_norms(view.y)


def squared_norms(features: Tensor) -> Tensor:
    """|x_i|^2, [n], in float32 at least."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return wide.square().sum(-1)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_i|^2, [n], in float32 at least: of what differs by little, 16 bits would leave nothing."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return squared_norms(x.to(dtype) - y.to(dtype))
