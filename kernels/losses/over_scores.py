"""Any loss over features, of a score matrix that something else made."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .base import ContrastiveLoss
from .clip import checked_weights


def over_scores(
    loss: ContrastiveLoss,
    of_images: Tensor,
    of_texts: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    *,
    start: int = 0,
    **given: Any,
) -> Tensor:
    """`loss` of a given score matrix instead of the dot products of features.

    S = S I, so the rows of S are features, and those of the identity their partners: every loss takes them as they are, on
    several ranks too. It costs 2 N^2 M operations, which beside the token products of late interaction are nothing.

    Args:
        loss: any of this package that takes two feature matrices aligned by position.
        of_images: [n, N], scores of this rank's n images with the whole batch's N texts; what images are normalised over.
            Finite: fill the -inf of empty documents with -1e30, say. Its dtype is the features' dtype: float32 keeps all digits.
        of_texts: [n, N], scores of the same pairs that texts are normalised over, where those are others (FILIP's are);
            None: the same. The loss needs `direction_weights` then.
        logit_scale: factor of the scores.
        start: position of this rank's first pair in the whole batch.
        given: further arguments of the loss.

    Returns:
        What the loss returns.

    Raises:
        ValueError: matrices that are no [n, N], a start out of its range, two matrices for a loss that has no `direction_weights`, and what the loss raises.

    Example:
        # On several ranks first `_, d, d_mask = pairtile.kernels.distributed.gather_tokens(d, d_mask, group=group)`.
        loss = over_scores(SigLipLoss(), maxsim(q, d, q_mask, d_mask), None, scale, logit_bias=bias)
    """
    for scores in (of_images, of_images if of_texts is None else of_texts):
        _check_scores(scores, start, alone=loss._group() is None)
    partners = torch.zeros_like(of_images)
    partners[:, start : start + len(partners)].fill_diagonal_(1)
    if of_texts is None:
        return loss(of_images, partners, logit_scale, **given)  # type: ignore[no-any-return]
    if not hasattr(loss, "direction_weights"):
        raise ValueError(f"{type(loss).__name__} has no direction_weights: it takes one matrix, of_texts=None")
    image_to_text, text_to_image = checked_weights(loss.direction_weights)  # type: ignore[arg-type]
    parts: list[Tensor] = []
    for scores, weights in ((of_images, (image_to_text, 0.0)), (of_texts, (0.0, text_to_image))):
        if any(weights):
            directed = copy.copy(loss)
            directed.direction_weights = weights  # type: ignore[assignment]
            parts.append(directed(scores, partners, logit_scale, **given))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _check_scores(scores: Tensor, start: int, *, alone: bool) -> None:
    if scores.dim() != 2 or (alone and (scores.shape[0] != scores.shape[1] or start)):
        raise ValueError(
            f"scores {list(scores.shape)} with start={start}: expected [n, N], this rank's images with all texts; on one "
            "process [N, N] and start=0 (candidates that belong to no image are negatives of the loss itself)"
        )
    if not 0 <= start <= scores.shape[1] - scores.shape[0]:
        raise ValueError(
            f"start={start} with scores {list(scores.shape)}: expected a column for each row from there on"
        )
