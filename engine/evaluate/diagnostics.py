"""Geometry of the embedding space: modality gap, alignment, uniformity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..strict import StrictModel
from .measure import Measure
from .topk import SCORE_CHUNK, query_blocks

#: Uniformity compares all pairs; beyond this many vectors an evenly spaced sample is used.
UNIFORMITY_SAMPLES = 8192


class Diagnostics(StrictModel):
    """Of unit vectors; NaN where undefined (fewer than two vectors, no pair)."""

    modality_gap: Measure
    alignment: Measure
    image_uniformity: Measure
    text_uniformity: Measure


@torch.no_grad()
def diagnose(image_features: Tensor, text_features: Tensor, owner_text: Tensor, owner_image: Tensor) -> Diagnostics:
    """Diagnostics of a split; the vectors are normalised first.

    - modality gap: ``|mean(image) - mean(text)|`` (Liang et al., "Mind the Gap", 2022);
    - alignment: ``mean |x - y|^2`` over the pairs of image and caption (Wang and Isola, 2020);
    - uniformity: ``log mean_{i != j} exp(-2 |x_i - x_j|^2)``, 0 for a collapsed model, about -4 at best (ibid.).

    Args:
        image_features: [N, D]. text_features: [M, D].
        owner_text, owner_image: int64 [P] each, the pairs.
    """
    images, texts = F.normalize(image_features.float(), dim=1), F.normalize(text_features.float(), dim=1)
    return Diagnostics(
        modality_gap=float((images.mean(dim=0) - texts.mean(dim=0)).norm()),
        alignment=alignment(images, texts, owner_text, owner_image),
        image_uniformity=uniformity(images),
        text_uniformity=uniformity(texts),
    )


def alignment(images: Tensor, texts: Tensor, owner_text: Tensor, owner_image: Tensor) -> float:
    """Mean squared distance over pairs, streamed: unit vectors [N, D], [M, D], pairs int64 [P]."""
    total = 0.0
    rows = max(1, SCORE_CHUNK // max(1, images.shape[1]))
    for text, image in zip(owner_text.split(rows), owner_image.split(rows)):
        total += float((images[image] - texts[text]).square().sum(dtype=torch.float64))
    return total / len(owner_text) if len(owner_text) else math.nan


def uniformity(features: Tensor, *, chunk: int = SCORE_CHUNK, max_samples: int = UNIFORMITY_SAMPLES) -> float:
    """Log of the mean Gaussian potential over pairs i != j of unit vectors [N, D], in blocks of rows."""
    if len(features) > max_samples:
        spaced = torch.linspace(0, len(features) - 1, max_samples, dtype=torch.float64, device=features.device)
        features = features[spaced.long()]
    count = len(features)
    if count < 2:
        return math.nan
    total = 0.0
    for block in query_blocks(count, count, chunk):
        # |x - y|^2 = 2 - 2 <x, y>, so exp(-2 |x - y|^2) = exp(4 <x, y> - 4).
        potential = (4 * (features[block] @ features.T) - 4).exp_()
        potential.diagonal(offset=block.start).zero_()
        total += float(potential.sum(dtype=torch.float64))
    return math.log(total / (count * (count - 1))) if total > 0 or math.isnan(total) else -math.inf
