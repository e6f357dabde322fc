"""Similarity distribution matching: reverse divergence from the distribution of equal ids."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive import LogSumExp, PairScore, Reduction, SoftmaxMean
from ..contrastive.arguments import check_indices
from .base import check_pairs, check_scalar
from .batch import PairBatch, Side, View
from .two_way import Options, TwoWayLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SDMLoss(TwoWayLoss):
    """Similarity distribution matching (SDM of IRRA, arXiv:2303.12501): KL(p || q) from ids.

    With S_ij = logit_scale <image_i, text_j>, p_ij = softmax_j(S_ij) and q_ij = [id_i = id_j] / n_i, n_i the number of
    texts with the id of image i, the term of row i is

        sum_j p_ij log(p_ij / (q_ij + eps)),

    that of column j the same along the columns. The paper adds the directions up, which is the default of
    direction_weights. It is the reverse of a cross-entropy: mass on pairs of unequal ids costs -log eps each.
    It is computed from the log-sum-exp and the mean score of the positives and of the others apart, so that the
    small part of the two does not drown in the large one.

    Args:
        eps: keeps the divergence finite where q_ij = 0.
        direction_weights: (image to text, text to image). A direction of weight 0 is not computed.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
    """

    def __init__(
        self,
        *,
        eps: float = 1e-8,
        direction_weights: tuple[float, float] = (1.0, 1.0),
        **options: Unpack[Options],
    ) -> None:
        super().__init__(direction_weights=direction_weights, **options)
        if not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
            raise ValueError(f"eps={eps!r}: expected a positive number")
        self.eps = float(eps)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        ids: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], normalised as the model defines it; any floating dtype.
            text_features: [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            ids: int64 [batch], whom pair i shows: pairs of equal ids are positives of each other. None: of itself alone.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        if ids is not None:
            check_indices(ids, "ids", image_features.shape[0], "pair", image_features.device)
        batch = PairBatch(Side(image_features, ids), Side(text_features, ids), self._group())
        reduced = self._reduce(batch, _by_position if ids is None else _by_id, scale=logit_scale)
        log_target = math.log(1 + self.eps) if ids is None else torch.log(1 / batch.positives() + self.eps)

        def formula(results: tuple[Tensor, ...]) -> Tensor:
            positive, negative, negative_mean, *positive_mean = results
            # log p of the mean positive, up to what the positives differ among themselves: 0 for one of them.
            spread = positive_mean[0] - positive if positive_mean else 0.0
            attracted = F.logsigmoid(positive - negative) + spread - log_target
            repelled = negative_mean - torch.logaddexp(positive, negative) - math.log(self.eps)
            difference = positive - negative
            return torch.sigmoid(difference) * attracted + torch.sigmoid(-difference) * repelled

        loss = self._finish(self._terms(formula, *reduced), batch.shards)
        return {"contrastive_loss": loss} if output_dict else loss


def _by_position(view: View) -> list[Reduction]:
    own = view.own
    return [PairScore(own), LogSumExp(exclude=own), SoftmaxMean(exclude=own)]


def _by_id(view: View) -> list[Reduction]:
    same, different = view.same, view.different
    return [
        LogSumExp(exclude=different),
        LogSumExp(exclude=same),
        SoftmaxMean(exclude=same),
        SoftmaxMean(exclude=different),
    ]
