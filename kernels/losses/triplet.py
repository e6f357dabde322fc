"""Hinge losses on triplets."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive import HingeSum, Max, PairScore, Reduction
from .base import check_matrix, check_pairs, check_scalar
from .batch import PairBatch, Side, View
from .directions import TwoDirectionLoss


class TripletLoss(TwoDirectionLoss):
    """Hinge over the mismatched pairs of a batch: all of them, or the hardest (VSE++, arXiv:1707.05612).

    With S_ij = logit_scale <image_i, text_j> (cosines, unless a scale is given) and [z]_+ = max(z, 0), image i has

        mining="sum":      sum_{j != i} [margin + S_ij - S_ii]_+
        mining="hardest":  max_{j != i} [margin + S_ij - S_ii]_+

    and a text the same with S_ji. Each direction is a mean over the whole batch. The paper adds up both directions and
    all pairs: direction_weights=(1.0, 1.0), reduction="sum". Among equally hard ones the lowest index is taken. A batch
    of one pair has the loss 0.

    Given the features of a peer model, whose similarities A get no gradient, margins adapt to what the peer sees (Deep
    Boosting Learning, arXiv:2404.18114). In its relative form S - A takes the place of S in both formulas:

        [margin + (A_ii - A_ij) - (S_ii - S_ij)]_+

    and in its absolute form, which has the hardest pair alone, with g = positive_share, image i has

        [g margin + A_ii - S_ii]_+ + max_{j != i} [(1 - g) margin + S_ij - A_ij]_+.

    S - A is the similarity of [image, -peer_image] and [text, peer_text], so one sweep serves, of wider features.

    Args:
        margin: in units of S.
        mining: "sum" or "hardest".
        peer_form: "relative" or "absolute"; of no effect without a peer.
        positive_share: g, from 0 to 1.
        options: direction_weights, rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: values out of their range, peer_form="absolute" with mining="sum", or options as in `ClipLoss`.
    """

    def __init__(
        self,
        margin: float = 0.2,
        mining: str = "sum",
        *,
        peer_form: str = "relative",
        positive_share: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(margin, (int, float)) or not math.isfinite(margin):
            raise ValueError(f"margin={margin!r}: expected a number in units of the scores")
        if mining not in ("sum", "hardest"):
            raise ValueError(f'mining={mining!r}: expected "sum" or "hardest"')
        if peer_form not in ("relative", "absolute"):
            raise ValueError(f'peer_form={peer_form!r}: expected "relative" or "absolute"')
        if peer_form == "absolute" and mining == "sum":
            raise ValueError('peer_form="absolute" is a form of the hardest pair: pass mining="hardest"')
        if not 0 <= positive_share <= 1:
            raise ValueError(f"positive_share={positive_share!r}: expected a number from 0 to 1")
        self.margin = float(margin)
        self.mining = mining
        self.peer_form = peer_form
        self.positive_share = positive_share

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor = 1.0,
        output_dict: bool = False,
        *,
        peer_image_features: Tensor | None = None,
        peer_text_features: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], unit vectors where S is to be a cosine; any floating dtype.
            text_features: [batch, D].
            logit_scale: a factor of S, and of A, a float or a tensor of shape [] or [1].
            output_dict: return {"contrastive_loss": loss}.
            peer_image_features: [batch, D'], the peer's embeddings of the same images, of any width. No gradient goes
                to them. They are multiplied in the dtype of the features.
            peer_text_features: [batch, D'].

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, or a peer of one modality.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        has_peer = _check_peer(peer_image_features, peer_text_features, image_features.shape[0])
        x, y = image_features, text_features
        if peer_image_features is not None and peer_text_features is not None:
            x = torch.cat([x, -peer_image_features.detach().to(x.dtype)], 1)
            y = torch.cat([y, peer_text_features.detach().to(y.dtype)], 1)
        batch = PairBatch(Side(x), Side(y), exchange=self._exchange())
        rows, cols = (self._ask if weight else None for weight in self.direction_weights)
        of_images, of_texts = batch.reduce(scale=logit_scale, rows=rows, cols=cols)
        absolute = has_peer and self.peer_form == "absolute"
        terms = [self._terms(found, absolute) if found else None for found in (of_images, of_texts)]
        loss = self._combined(terms[0], terms[1], batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _ask(self, view: View) -> list[Reduction]:
        if self.mining == "sum":
            return [HingeSum(self.margin, view.own)]
        return [Max(exclude=view.own), PairScore(view.own)]

    def _terms(self, results: tuple[Tensor, ...], absolute: bool) -> Tensor:
        if self.mining == "sum":
            return results[0]
        hardest, own = results
        if not absolute:
            return F.relu(self.margin + hardest - own)
        of_positive = self.positive_share * self.margin
        return F.relu(of_positive - own) + F.relu(self.margin - of_positive + hardest)


def _check_peer(images: Tensor | None, texts: Tensor | None, batch: int) -> bool:
    """Whether there is a peer."""
    if (images is None) != (texts is None):
        raise ValueError("a peer needs both peer_image_features and peer_text_features")
    if images is None or texts is None:
        return False
    check_matrix("peer_image_features", images)
    check_matrix("peer_text_features", texts, width=images.shape[1])
    if images.shape[0] != batch or texts.shape[0] != batch:
        raise ValueError(
            f"the peer embeds {images.shape[0]} images and {texts.shape[0]} texts: expected {batch} of both, one for "
            "each pair"
        )
    return True
