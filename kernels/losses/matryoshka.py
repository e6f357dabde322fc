"""Nested contrastive losses: prefixes of the embedding that are embeddings themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive import Diagonal
from ..contrastive.sums import cross_entropies, cross_entropy_sum
from ..distributed import Shards, gather
from .base import check_pairs, check_scalar
from .directions import TwoDirectionLoss


class MatryoshkaLoss(TwoDirectionLoss):
    """The loss of CLIP on nested prefixes of the features (Matryoshka representations, arXiv:2205.13147).

    With x[:w] the first w features, divided by their norm, the loss is

        sum_w weight_w ClipLoss(x[:w] / |x[:w]|, y[:w] / |y[:w]|, logit_scale),

    so that every prefix can be searched by itself. ClipLoss, several ranks, value and gradient as there.

    Args:
        widths: the nested widths, (64, 128, 256, 512) say; those of the features themselves only if named.
        weights: one for each width; None: 1 for each, as in the paper.
        normalize: bring each prefix to unit length, as retrieval does. False takes the prefixes as they are.
        direction_weights: (image to text, text to image). A direction of weight 0 is not computed.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
    """

    def __init__(
        self,
        widths: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        normalize: bool = True,
        direction_weights: tuple[float, float] = (0.5, 0.5),
        **options: Any,
    ) -> None:
        super().__init__(direction_weights=direction_weights, **options)
        self.widths = tuple(widths)
        self.weights = (1.0,) * len(self.widths) if weights is None else tuple(float(weight) for weight in weights)
        self.normalize = normalize
        if not self.widths or any(not isinstance(width, int) or width < 1 for width in self.widths):
            raise ValueError(f"widths={widths!r}: expected whole numbers from 1, the nested widths")
        if len(self.weights) != len(self.widths):
            raise ValueError(f"{len(self.weights)} weights for {len(self.widths)} widths: expected one for each")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], D at least the largest width; any floating dtype. Need not be normalised.
            text_features: [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1]; of all widths.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        if max(self.widths) > image_features.shape[1]:
            raise ValueError(f"widths={self.widths}: the features have {image_features.shape[1]}")
        batch, (all_images, all_texts) = gather(image_features, text_features, group=self._group())
        image_to_text, text_to_image = self.direction_weights
        if batch.group is None:
            sweeps = [(image_features, text_features, image_to_text, text_to_image)]
        else:
            sweeps = [(image_features, all_texts, image_to_text, 0.0), (text_features, all_images, text_to_image, 0.0)]
        shares = [self._share(*sweep, logit_scale, batch) for sweep in sweeps if sweep[2] or sweep[3]]
        loss = self._finish(shares[0] if len(shares) == 1 else shares[0] + shares[1], batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _share(
        self, x: Tensor, y: Tensor, row_weight: float, col_weight: float, scale: float | Tensor, batch: Shards
    ) -> Tensor:
        """This rank's terms, [n]; or their sum, with the batch's weight, where the reduction is one."""
        summed = self.reduction != "none"
        inside, outside = self._weights(batch) if summed else (1.0, 1.0)
        share = nested_cross_entropy(
            x,
            y,
            self.widths,
            self.weights,
            scale=scale,
            pair=Diagonal(batch.start),
            row_weight=inside * row_weight,
            col_weight=inside * col_weight,
            normalize=self.normalize,
            summed=summed,
        )
        return share if outside == 1 else share * outside


def nested_cross_entropy(
    x: Tensor,
    y: Tensor,
    widths: Sequence[int],
    weights: Sequence[float],
    *,
    scale: float | Tensor,
    pair: Diagonal,
    row_weight: float,
    col_weight: float,
    normalize: bool,
    summed: bool,
) -> Tensor:
    """sum_w weight_w (row_weight CE(rows of S_w) + col_weight CE(columns of S_w)), S_w = scale * x[:, :w] y[:, :w]^T.

    Returns:
        The sum over rows and columns; or, if not `summed`, [N]: of row i and, for N = M, of column i.
    """
    total: Tensor | None = None
    for width, weight in zip(widths, weights, strict=True):
        prefixes = [_prefix(features, width, normalize) for features in (x, y)]
        if summed:
            term = cross_entropy_sum(
                *prefixes, scale=scale, pair=pair, row_weight=weight * row_weight, col_weight=weight * col_weight
            )
        else:
            both = cross_entropies(*prefixes, scale=scale, pair=pair, rows=row_weight != 0, cols=col_weight != 0)
            listed = [
                weight * direction * terms
                for direction, terms in zip((row_weight, col_weight), both, strict=True)
                if terms is not None
            ]
            term = torch.stack(listed).sum(0)
        total = term if total is None else total + term
    assert total is not None
    return total


def _prefix(features: Tensor, width: int, normalize: bool) -> Tensor:
    prefix = features[:, :width]
    if not normalize:
        return prefix
    # The norm in float32: one rounding of 16-bit features, as the model's own normalisation has.
    wide = prefix.to(torch.promote_types(prefix.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(features.dtype)
