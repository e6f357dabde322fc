"""Losses against soft targets, distances and prefixes: for each a call of ours, and its reference, on one kind of batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import alignment_uniformity
import cacr
import cwcl
import distill
import matryoshka
import mod_x
import momentum
import sdm
import soft_target
import vicinity_mix
from pairtile.kernels import (
    AlignmentUniformityLoss,
    CACRLoss,
    CWCLLoss,
    DistillClipLoss,
    MatryoshkaLoss,
    ModXLoss,
    MomentumDistillationLoss,
    SDMLoss,
    SoftClipLoss,
    SoftTargetLoss,
    VicinityMixLoss,
)

WIDTHS, WEIGHTS = (2, 5), (0.5, 2.0)


@dataclass
class Beside:
    """What a batch has beside its features: nothing of it takes a gradient.

    Attributes:
        teacher, other_teacher: (images [n, D'], texts [n, D']); the first is right about most pairs.
        momentum: (images [n, D], texts [n, D]).
        queues: (images [q, D], texts [q', D]), the same on all ranks.
        ids: int64 [n].
        perm, lam: int64 [n] and float [n]; perm counts from the rank's first row.
    """

    teacher: tuple[Tensor, Tensor]
    other_teacher: tuple[Tensor, Tensor]
    momentum: tuple[Tensor, Tensor]
    queues: tuple[Tensor, Tensor]
    ids: Tensor
    perm: Tensor
    lam: Tensor

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Beside:
        found: dict[str, Any] = {}
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            both = isinstance(value, tuple)
            found[name] = tuple(change(name, each) for each in value) if both else change(name, value)
        return Beside(**found)

    def to(self, dtype: torch.dtype) -> Beside:
        return self.mapped(lambda _, value: value.to(dtype) if value.is_floating_point() else value)

    def rows(self, start: int, stop: int) -> Beside:
        return self.mapped(lambda name, value: value if name == "queues" else value[start:stop])


def beside(sizes: list[int], width: int, seed: int = 0) -> Beside:
    """Of a batch over ranks with these numbers of rows; float64, of float32 numbers."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)

    def unit(rows: int, features: int) -> Tensor:
        drawn = torch.randn(rows, features, generator=generator, dtype=torch.float64)
        return F.normalize(drawn, dim=-1).float().double()

    teacher = unit(n, width)
    return Beside(
        teacher=(teacher, F.normalize(teacher + 0.8 * unit(n, width), dim=-1).float().double()),
        other_teacher=(unit(n, 3), unit(n, 3)),
        momentum=(unit(n, width), unit(n, width)),
        queues=(unit(4, width), unit(3, width)),
        ids=torch.randint(0, max(1, n // 2), (n,), generator=generator),
        perm=torch.cat([torch.arange(size).roll(1) * (torch.arange(size) != 2) for size in sizes]),
        lam=torch.rand(n, generator=generator, dtype=torch.float64).float().double(),
    )


class Objective(NamedTuple):
    """`make(**options)` is the loss; `call(loss, x, y, scale, beside)` gives its value or its terms.

    `dense(logits, x, y, beside)` gives the terms [n] (for alignment and uniformity the value), `logits` as in `Logits`.
    """

    make: Callable[..., torch.nn.Module]
    call: Callable[..., Tensor]
    dense: Callable[..., Tensor]


def _momentum(logits, x, y, b):
    (image_keys, text_keys), (image_queue, text_queue) = b.momentum, b.queues
    of_images = momentum.direction(logits, x, image_keys, torch.cat([text_keys, text_queue]), 0.4)
    return (of_images + momentum.direction(logits, y, text_keys, torch.cat([image_keys, image_queue]), 0.4)) / 2


def _distill(logits, x, y, b):
    scores, teachers = logits(x, y), (20 * b.teacher[0] @ b.teacher[1].T, 3 * b.other_teacher[0] @ b.other_teacher[1].T)
    return distill.contrastive(scores) + distill.distillation(scores, list(teachers))


def _alignment_uniformity(logits, x, y, b):
    within = (alignment_uniformity.uniformity(x, x, 2.0) + alignment_uniformity.uniformity(y, y, 2.0)) / 2
    across = alignment_uniformity.uniformity(x, y, 2.0)
    aligned = alignment_uniformity.alignment(x, y)
    return distill.contrastive(logits(x, y)).mean() + 0.5 * aligned + 2 * within + 0.7 * across


_CACR = {"tau_pos": 1.5, "tau_neg": 0.7, "alpha": 1.2, "beta": 0.8}
_CACR_IN_ORDER = tuple(_CACR.values())

OBJECTIVES: dict[str, Objective] = {
    "distill": Objective(
        DistillClipLoss,
        lambda loss, x, y, s, b: sum(loss(x, y, s, *zip(b.teacher, b.other_teacher), [20.0, 3.0])),
        _distill,
    ),
    "soft_target": Objective(
        lambda **options: SoftTargetLoss(alpha=0.3, direction_weights=(0.2, 1.0), **options),
        lambda loss, x, y, s, b: loss(x, y, s, *b.teacher, 20.0),
        lambda logits, x, y, b: soft_target.soft_target(
            logits(x, y), 20 * b.teacher[0] @ b.teacher[1].T, 0.3, (0.2, 1.0)
        ),
    ),
    "soft_clip": Objective(
        SoftClipLoss,
        lambda loss, x, y, s, b: loss(x, y, s, 5.0),
        lambda logits, x, y, b: soft_target.soft_clip(logits(x, y), y.detach(), 5.0),
    ),
    "momentum": Objective(
        MomentumDistillationLoss,
        lambda loss, x, y, s, b: loss(x, y, s, *b.momentum, *b.queues),
        _momentum,
    ),
    "cwcl": Objective(
        CWCLLoss,
        lambda loss, x, y, s, b: loss(x, y, s, b.other_teacher[0]),
        lambda logits, x, y, b: cwcl.cwcl(logits(x, y), b.other_teacher[0]),
    ),
    "sdm": Objective(
        SDMLoss,
        lambda loss, x, y, s, b: loss(x, y, s),
        lambda logits, x, y, b: sdm.sdm(logits(x, y), list(range(len(x)))),
    ),
    "sdm_by_id": Objective(
        SDMLoss,
        lambda loss, x, y, s, b: loss(x, y, s, image_ids=b.ids),
        lambda logits, x, y, b: sdm.sdm(logits(x, y), b.ids.tolist()),
    ),
    "mod_x": Objective(
        lambda **options: ModXLoss(distill_weight=2.0, clip_loss_weight=0.5, **options),
        lambda loss, x, y, s, b: loss(x, y, s, *b.teacher, 20.0),
        lambda logits, x, y, b: mod_x.mod_x(logits(x, y), 20 * b.teacher[0] @ b.teacher[1].T, 2.0, 0.5),
    ),
    "vicinity_mix": Objective(
        VicinityMixLoss,
        lambda loss, x, y, s, b: loss(x, y, s, b.perm, b.lam),
        lambda logits, x, y, b: vicinity_mix.vicinity_mix(logits(x, y), b.perm.tolist(), b.lam.tolist()),
    ),
    "cacr": Objective(
        lambda **options: CACRLoss(**_CACR, **options),
        lambda loss, x, y, s, b: loss(x, y),
        lambda logits, x, y, b: cacr.cacr(x, y, list(range(len(x))), *_CACR_IN_ORDER),
    ),
    "cacr_by_id": Objective(
        lambda **options: CACRLoss(**_CACR, **options),
        lambda loss, x, y, s, b: loss(x, y, text_ids=b.ids),
        lambda logits, x, y, b: cacr.cacr(x, y, b.ids.tolist(), *_CACR_IN_ORDER),
    ),
    "alignment_uniformity": Objective(
        lambda **options: AlignmentUniformityLoss(
            alignment_weight=0.5, uniformity_weight=2.0, cross_uniformity_weight=0.7, **options
        ),
        lambda loss, x, y, s, b: loss(x, y, s),
        _alignment_uniformity,
    ),
    "matryoshka": Objective(
        lambda **options: MatryoshkaLoss(WIDTHS, WEIGHTS, **options),
        lambda loss, x, y, s, b: loss(x, y, s),
        lambda logits, x, y, b: matryoshka.matryoshka(logits, x, y, WIDTHS, WEIGHTS, True),
    ),
}
