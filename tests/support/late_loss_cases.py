"""Batches of token sets, and the losses over them with their references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import late_losses as reference
from pairtile.kernels import ColbertLoss, FilipLoss, LateDistillationLoss


@dataclass
class Batch:
    """x [n, Lx, D], y [n, Ly, D], each query's negatives [n, K, Ln, D], their masks, and a teacher's scores [n, K]."""

    x: Tensor
    y: Tensor
    negatives: Tensor
    x_mask: Tensor
    y_mask: Tensor
    negative_mask: Tensor
    teacher: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return self._mapped(lambda each: each.to(dtype) if each.is_floating_point() else each.clone())

    def rows(self, chosen: Any) -> Batch:
        return self._mapped(lambda each: each[chosen])

    def leaves(self) -> list[Tensor]:
        """x, y and the negatives, asked for their gradients."""
        return [each.requires_grad_() for each in (self.x, self.y, self.negatives)]

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(change(getattr(self, field.name)) for field in fields(self)))


def batch(n: int, seed: int = 0, *, x_length: int = 5, y_length: int = 3, width: int = 6, empty: bool = False) -> Batch:
    """Ragged sets of float32 numbers in float64; with `empty`, an image, a text and a negative have no token that counts."""
    generator = torch.Generator().manual_seed(seed)

    def sets(*shape: int) -> tuple[Tensor, Tensor]:
        tokens = F.normalize(torch.randn(*shape, width, generator=generator, dtype=torch.float64), dim=-1)
        lengths = torch.randint(1, shape[-1] + 1, shape[:-1], generator=generator)
        return tokens.float().double(), torch.arange(shape[-1]) < lengths.unsqueeze(-1)

    (x, x_mask), (y, y_mask), (negatives, negative_mask) = sets(n, x_length), sets(n, y_length), sets(n, 2, 4)
    teacher = torch.randn(n, 2, generator=generator, dtype=torch.float64).float().double()
    if empty:
        x_mask[1] = y_mask[3] = False
        negative_mask[0, 1] = False
    # What masked tokens hold has no effect.
    for tokens, mask in ((x, x_mask), (y, y_mask), (negatives, negative_mask)):
        tokens[~mask] = torch.nan
    return Batch(x, y, negatives, x_mask, y_mask, negative_mask, teacher)


class Loss(NamedTuple):
    """A loss, called with a batch and a scale, and its terms by the paper."""

    make: Callable[..., Any]
    call: Callable[[Any, Batch, Tensor], Tensor]
    terms: Callable[[Batch, Tensor], Tensor]


def _filip(weights: tuple[float, float]) -> Callable[[Batch, Tensor], Tensor]:
    def terms(b: Batch, scale: Tensor) -> Tensor:
        of_images = reference.token_scores(b.x, b.y, b.x_mask, b.y_mask, mean=True)
        of_texts = reference.token_scores(b.y, b.x, b.y_mask, b.x_mask, mean=True)
        both = reference.row_terms(scale * of_images), reference.row_terms(scale * of_texts)
        return weights[0] * both[0] + weights[1] * both[1]

    return terms


def _colbert(**options: Any) -> Callable[[Batch, Tensor], Tensor]:
    """Options as `ColbertLoss` has them."""
    scale_of = 1 / options.get("temperature", 1.0)
    mean = options.get("normalize_scores", False)
    negatives, weight = options.get("negatives"), options.get("in_batch_weight", 0.5)
    of_queries, of_documents = options.get("direction_weights", (1.0, 0.0))
    hardest = options.get("in_batch") == "hardest"

    def terms(b: Batch, scale: Tensor) -> Tensor:
        scores = scale * scale_of * reference.token_scores(b.x, b.y, b.x_mask, b.y_mask, mean=mean)
        extra = []
        for i in range(len(b.x)):
            chosen = [i] if negatives in ("own", "pairwise") else range(len(b.x))
            given = torch.cat([b.negatives[j] for j in chosen]), torch.cat([b.negative_mask[j] for j in chosen])
            present = given[1].any(1)
            one = slice(i, i + 1)
            found = reference.token_scores(b.x[one], given[0][present], b.x_mask[one], given[1][present], mean=mean)
            extra.append(scale * scale_of * found[0])
        inside = extra if negatives in ("own", "all") else None
        found = reference.row_terms(scores, inside, hardest=hardest)
        if negatives == "pairwise":
            found = weight * found + (1 - weight) * reference.pairwise(scores.diagonal(), extra)
        return of_queries * found + of_documents * reference.row_terms(scores.T, hardest=hardest)

    return terms


def _candidate_scores(b: Batch, scale: Tensor) -> Tensor:
    found = []
    for i in range(len(b.x)):
        one = slice(i, i + 1)
        found.append(reference.token_scores(b.x[one], b.negatives[i], b.x_mask[one], b.negative_mask[i], mean=False))
    return scale * torch.cat(found)


def _colbert_loss(**options: Any) -> Loss:
    with_negatives = "negatives" in options

    def call(loss: Any, b: Batch, scale: Tensor) -> Tensor:
        given = {"negative_tokens": b.negatives, "negative_mask": b.negative_mask} if with_negatives else {}
        return loss(b.x, b.y, scale, b.x_mask, b.y_mask, **given)

    return Loss(lambda **more: ColbertLoss(**options, **more), call, _colbert(**options))


def _filip_loss(**options: Any) -> Loss:
    weights = options.get("direction_weights", (0.5, 0.5))
    return Loss(
        lambda **more: FilipLoss(**options, **more),
        lambda loss, b, scale: loss(b.x, b.y, scale, b.x_mask, b.y_mask),
        _filip(weights),
    )


def _distillation(**options: Any) -> Loss:
    def terms(b: Batch, scale: Tensor) -> Tensor:
        scores = _candidate_scores(b, scale)
        if options.get("form") == "margin_mse":
            return reference.margin_mse(scores, b.teacher)
        return reference.distillation(scores, b.teacher, options.get("temperature", 1.0))

    return Loss(
        lambda **more: LateDistillationLoss(**options, **more),
        lambda loss, b, scale: loss(b.x, b.negatives, b.teacher, scale, b.x_mask, b.negative_mask),
        terms,
    )


LOSSES = {
    "filip": _filip_loss(),
    "filip_uneven": _filip_loss(direction_weights=(0.3, 1.0), travelling="image"),
    "filip_one_way": _filip_loss(direction_weights=(0.0, 2.0)),
    "colbert": _colbert_loss(),
    "colbert_mean": _colbert_loss(temperature=0.2, normalize_scores=True, direction_weights=(1.0, 0.5)),
    "colbert_own": _colbert_loss(negatives="own"),
    "colbert_all": _colbert_loss(negatives="all"),
    "colbert_hardest": _colbert_loss(in_batch="hardest", direction_weights=(0.5, 0.5)),
    "colbert_pairwise": _colbert_loss(negatives="pairwise", in_batch_weight=0.3),
    "colbert_negatives_alone": _colbert_loss(negatives="pairwise", in_batch_weight=0.0),
    "distillation": _distillation(temperature=0.7),
    "margin_mse": _distillation(form="margin_mse"),
}
