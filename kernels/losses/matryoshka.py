"""Nested contrastive losses: prefixes of the embedding that are embeddings themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..contrastive import Diagonal
from ..contrastive.nested import nested_cross_entropy_sum, prefix
from ..contrastive.sums import cross_entropies
from ..distributed import Exchange, Shards, gather
from .base import check_pairs, check_scalar
from .batch import PairBatch, Side
from .clip import others_and_own
from .directions import TwoDirectionLoss
from .log_domain import cross_entropy


class MatryoshkaLoss(TwoDirectionLoss):
    """The loss of CLIP on nested prefixes of the features (Matryoshka representations, arXiv:2205.13147).

    With x[:w] the first w features, divided by their norm, the loss is

        sum_w weight_w ClipLoss(x[:w] / |x[:w]|, y[:w] / |y[:w]|, logit_scale),

    so that every prefix can be searched by itself. ClipLoss, several ranks, value and gradient as there. On the `cpp`
    backend float32 features take one sweep for all widths while the logit scale is at most 50
    (`contrastive/nested.py`); elsewhere each width takes one.

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
        if len(set(self.widths)) < len(self.widths):
            raise ValueError(f"widths={widths!r}: one of them comes twice; give it the sum of the weights")
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
        exchange = self._exchange()
        if exchange is not None and exchange.strategy == "ring":
            loss = self._in_ring(exchange, image_features, text_features, logit_scale)
            return {"contrastive_loss": loss} if output_dict else loss
        batch, (all_images, all_texts) = gather(
            image_features, text_features, group=self._group(), wire_dtype=self.wire_dtype
        )
        image_to_text, text_to_image = self.direction_weights
        if batch.group is None:
            sweeps = [(image_features, text_features, image_to_text, text_to_image)]
        else:
            sweeps = [(image_features, all_texts, image_to_text, 0.0), (text_features, all_images, text_to_image, 0.0)]
        shares = [self._share(*sweep, logit_scale, batch) for sweep in sweeps if sweep[2] or sweep[3]]
        loss = self._finish(shares[0] if len(shares) == 1 else shares[0] + shares[1], batch)
        return {"contrastive_loss": loss} if output_dict else loss

    def _in_ring(self, exchange: Exchange, images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor:
        rows, cols = (others_and_own if weight else None for weight in self.direction_weights)
        terms: list[Tensor] = []
        for width, weight in zip(self.widths, self.weights, strict=True):
            x, y = prefix(images, width, self.normalize), prefix(texts, width, self.normalize)
            batch = PairBatch(Side(x), Side(y), exchange)
            directions = zip(self.direction_weights, batch.reduce(scale=scale, rows=rows, cols=cols), strict=True)
            terms += [weight * direction * cross_entropy(*results) for direction, results in directions if direction]
        return self._finish(torch.stack(terms).sum(0), batch.shards)

    def _share(
        self, x: Tensor, y: Tensor, row_weight: float, col_weight: float, scale: float | Tensor, batch: Shards
    ) -> Tensor:
        """This rank's terms, [n]; or their sum, with the batch's weight, where the reduction is one."""
        if self.reduction == "none":
            return self._terms(x, y, row_weight, col_weight, scale, Diagonal(batch.start))
        inside, outside = self._weights(batch)
        order = sorted(range(len(self.widths)), key=self.widths.__getitem__)
        share = nested_cross_entropy_sum(
            x,
            y,
            scale=scale,
            widths=[self.widths[k] for k in order],
            weights=[self.weights[k] for k in order],
            normalize=self.normalize,
            offset=batch.start,
            row_weight=inside * row_weight,
            col_weight=inside * col_weight,
        )
        return share if outside == 1 else share * outside

    def _terms(
        self, x: Tensor, y: Tensor, row_weight: float, col_weight: float, scale: float | Tensor, pair: Diagonal
    ) -> Tensor:
        """Of row i, and of column i where columns count, [N]."""
        listed: list[Tensor] = []
        for width, weight in zip(self.widths, self.weights, strict=True):
            both = cross_entropies(
                prefix(x, width, self.normalize),
                prefix(y, width, self.normalize),
                scale=scale,
                pair=pair,
                rows=row_weight != 0,
                cols=col_weight != 0,
            )
            listed += [
                weight * direction * terms
                for direction, terms in zip((row_weight, col_weight), both, strict=True)
                if terms is not None
            ]
        return torch.stack(listed).sum(0)
