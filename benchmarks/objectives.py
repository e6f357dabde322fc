"""The contenders of the suite of objectives: our losses, their dense formulas, and open_clip's distillation.

Everything is found by name, because the memory runs take it to another process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile import kernels
from pairtile.kernels import use_backend, use_memory_budget

from . import dense_pair_losses as pairs
from . import dense_soft_losses as soft
from .contrastive import clip_inputs, compiled
from .harness import Contender, forward_and_backward
from .peers import missing_backend, missing_compiler, missing_peer

#: Two teachers of MobileCLIP's width, and its fixed scale (arXiv:2311.17049).
TEACHERS, TEACHER_WIDTH, TEACHER_SCALE = 2, 768, 100.0
#: Ours with less working memory: a third of S at the size measured, where by default the most of it is kept.
LEAN, LEAN_BUDGET = "pairtile in 24 MiB", 24 * 2**20
#: Nested widths of the largest that is at most the features'.
WIDTHS = (64, 128, 256, 512)

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """An objective: ours and the dense formula, both called with the same leaves.

    Attributes:
        ours, dense: called as loss(images, texts, *more).
        more: (batch, width) -> the leaves behind the features; those that want a gradient say so.
        teacher_width: of all teachers together, whose products count too.
        products: of S, where a formula needs several.
        passes: forward, again in the backward, and the two of its gradients, in products of N M D.
        agreement: largest relative difference between contenders.
        miscompiled: why the compiled formula does not take part.
    """

    ours: Loss
    dense: Loss
    more: Callable[[int, int], list[Tensor]]
    teacher_width: int = 0
    products: float = 1.0
    passes: int = 8
    agreement: float = 1e-4
    miscompiled: str | None = None


#: Seen with 2.14.1 at batch 4096: finite, and off by 0.3 (weighted) and 200 (mil_nce) of their norm.
_WRONG_GRADIENTS = "torch.compile's gradients of this formula are wrong on the CPU (torch 2.14.1)"


def _scale(value: float = 14.3) -> Callable[[int, int], list[Tensor]]:
    return lambda batch, width: [torch.tensor(value).requires_grad_()]


def _ids(batch: int, kinds: int) -> Tensor:
    return torch.arange(batch) % max(1, batch // kinds)


def _scale_and_ids(
    *, both: bool = True, bias: float | None = None, value: float | None = 14.3
) -> Callable[[int, int], list[Tensor]]:
    """The scale, a bias if asked for, and ids of which two images and two texts share each."""

    def more(batch: int, width: int) -> list[Tensor]:
        numbers = [torch.tensor(each).requires_grad_() for each in (value, bias) if each is not None]
        return [*numbers, *[_ids(batch, 2)] * (2 if both else 1)]

    return more


def _features(batch: int, width: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [F.normalize(torch.randn(batch, width, generator=generator), dim=-1) for _ in range(count)]


def _scale_and_features(width: int | None, count: int) -> Callable[[int, int], list[Tensor]]:
    """The scale, and embeddings of other models; a width of None: that of the features."""
    return lambda batch, own: [*_scale()(batch, own), *_features(batch, width or own, count)]


def _mixed(batch: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [*_scale()(batch, width), torch.randperm(batch, generator=generator), torch.rand(batch, generator=generator)]


def _nested(width: int) -> tuple[int, ...]:
    return tuple(each for each in WIDTHS if each <= width)


def four_clip_losses(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Our own ClipLoss once for each width."""
    loss = kernels.ClipLoss()
    prefixes = [
        [F.normalize(each[:, :width], dim=-1) for each in (images, texts)] for width in _nested(images.shape[1])
    ]
    return torch.stack([loss(*both, scale) for both in prefixes]).sum()


def _distill(images: Tensor, texts: Tensor, scale: Tensor, *teachers: Tensor) -> Tensor:
    own, others = list(teachers[:TEACHERS]), list(teachers[TEACHERS:])
    contrastive, distilled = kernels.DistillClipLoss()(images, texts, scale, own, others, TEACHER_SCALE)
    return contrastive + distilled


def _dense_distill(images: Tensor, texts: Tensor, scale: Tensor, *teachers: Tensor) -> Tensor:
    own, others = teachers[:TEACHERS], teachers[TEACHERS:]
    return sum(soft.distill_clip_loss(images, texts, scale, own, others, [TEACHER_SCALE] * TEACHERS))


def open_clip_distill(images: Tensor, texts: Tensor, scale: Tensor, *teachers: Tensor) -> Tensor:
    """open_clip's DistillClipLoss with the softmax of several teachers averaged, and no other line changed."""
    loss = import_module("open_clip.loss").DistillClipLoss(cache_labels=True)
    by_image, by_text = loss.get_logits(images, texts, scale)
    taught = [
        loss.get_logits(x, y, TEACHER_SCALE) for x, y in zip(teachers[:TEACHERS], teachers[TEACHERS:], strict=True)
    ]
    labels = loss.get_ground_truth(images.device, by_image.shape[0])
    contrastive = (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2
    distilled = 0.0
    for side, student in enumerate((by_image, by_text)):
        target = sum(each[side].softmax(dim=1) for each in taught) / TEACHERS
        distilled = distilled - (target * student.log_softmax(dim=1)).sum(dim=1).mean(dim=0) / 2
    return contrastive + distilled


def _by_ids(loss: Loss) -> Loss:
    """Ids behind the features and the scale, as the dense formulas take them."""
    return lambda images, texts, *more: loss(images, texts, *more[:-2], image_ids=more[-2], text_ids=more[-1])


def rows() -> dict[str, Row]:
    """Made on demand: the classes check their options, and a version without one of them lacks its row alone."""
    k = kernels
    aligned = _scale_and_ids(both=False)
    return {
        "SigLipPlusLoss": Row(_by_ids(k.SigLipPlusLoss()), pairs.siglip_plus, _scale_and_ids(bias=-10.0, value=10.0)),
        "DecoupledContrastiveLoss": Row(k.DecoupledContrastiveLoss(), pairs.decoupled, _scale()),
        "DecoupledContrastiveLoss weighted": Row(
            k.DecoupledContrastiveLoss(weighted=True),
            partial(pairs.decoupled, weighted=True),
            _scale(),
            miscompiled=_WRONG_GRADIENTS,
        ),
        "MultiPositiveLoss mean, all": Row(_by_ids(k.MultiPositiveLoss()), pairs.multi_positive, _scale_and_ids()),
        "MultiPositiveLoss mean, others_excluded": Row(
            _by_ids(k.MultiPositiveLoss(denominator="others_excluded")),
            partial(pairs.multi_positive, denominator="others_excluded"),
            _scale_and_ids(),
        ),
        "MultiPositiveLoss inside, mil_nce": Row(
            _by_ids(k.MultiPositiveLoss(positives="inside", denominator="mil_nce")),
            partial(pairs.multi_positive, positives="inside", denominator="mil_nce"),
            _scale_and_ids(),
            miscompiled=_WRONG_GRADIENTS,
        ),
        "CircleLoss": Row(_by_ids(k.CircleLoss()), pairs.circle, _scale_and_ids(value=None)),
        "DebiasedContrastiveLoss": Row(k.DebiasedContrastiveLoss(), pairs.debiased, _scale(), agreement=1e-3),
        "HardNegativeLoss k = 8": Row(
            k.HardNegativeLoss(k=8, threshold=0.1), pairs.hard_negatives, _scale(), agreement=1e-3
        ),
        "TripletLoss sum": Row(k.TripletLoss(), pairs.triplet, _scale(1.0), agreement=1e-3),
        "TripletLoss hardest": Row(
            k.TripletLoss(mining="hardest"),
            partial(pairs.triplet, mining="hardest"),
            _scale(1.0),
            passes=2,
            agreement=1e-3,
        ),
        "DistillClipLoss 2 teachers": Row(
            _distill,
            _dense_distill,
            _scale_and_features(TEACHER_WIDTH, 2 * TEACHERS),
            teacher_width=TEACHERS * TEACHER_WIDTH,
        ),
        "SoftTargetLoss": Row(
            lambda *leaves: k.SoftTargetLoss()(*leaves, TEACHER_SCALE),
            lambda *leaves: soft.soft_target_loss(*leaves, TEACHER_SCALE),
            _scale_and_features(TEACHER_WIDTH, 2),
            teacher_width=TEACHER_WIDTH,
        ),
        "SoftClipLoss": Row(
            lambda *leaves: k.SoftClipLoss()(*leaves, 10.0),
            lambda *leaves: soft.soft_clip_loss(*leaves, 10.0),
            _scale(),
            teacher_width=512,
        ),
        "MomentumDistillationLoss": Row(
            k.MomentumDistillationLoss(),
            soft.momentum_distillation_loss,
            _scale_and_features(None, 4),
            teacher_width=2048,
            products=4.0,
        ),
        "CWCLLoss": Row(k.CWCLLoss(), soft.cwcl_loss, _scale()),
        "SDMLoss": Row(
            lambda images, texts, scale, ids: k.SDMLoss()(images, texts, scale, image_ids=ids, text_ids=ids),
            soft.sdm_loss,
            aligned,
        ),
        "ModXLoss": Row(
            lambda *leaves: k.ModXLoss()(*leaves, 20.0),
            lambda *leaves: soft.mod_x_loss(*leaves, 20.0),
            _scale_and_features(None, 2),
            teacher_width=512,
        ),
        "CACRLoss": Row(
            lambda images, texts, ids: k.CACRLoss()(images, texts, image_ids=ids, text_ids=ids),
            soft.cacr_loss,
            _scale_and_ids(both=False, value=None),
        ),
        "AlignmentUniformityLoss": Row(
            k.AlignmentUniformityLoss(), soft.alignment_uniformity_loss, _scale(), products=4.0
        ),
        "VicinityMixLoss": Row(k.VicinityMixLoss(), soft.vicinity_mix_loss, _mixed),
        "MatryoshkaLoss": Row(
            lambda images, texts, scale: k.MatryoshkaLoss(_nested(images.shape[1]))(images, texts, scale),
            lambda images, texts, scale: soft.matryoshka_loss(images, texts, scale, _nested(images.shape[1])),
            _scale(),
        ),
    }


def inputs(batch: int, width: int, *, name: str) -> list[Tensor]:
    """Image and text features [batch, width] as for CLIP, and what else the loss of that name takes."""
    images, texts, _ = clip_inputs(batch, width)
    return [images, texts, *rows()[name].more(batch, width)]


def _found(name: str, which: str) -> Loss:
    if which == "open_clip":
        return open_clip_distill
    if which == "four calls":
        return four_clip_losses
    row = rows()[name]
    if which == "dense":
        return row.dense
    return compiled(row.dense) if which == "compiled" else row.ours


def _served(name: str, backend: str, budget: int | None = None) -> Loss:
    loss = _found(name, "ours")

    def served(*leaves: Tensor) -> Tensor:
        with use_backend(backend), nullcontext() if budget is None else use_memory_budget(budget):
            return loss(*leaves)

    return served


def contenders(name: str) -> list[Contender]:
    """Ours, the dense formula and the same compiled; and whom else the row of this name is measured against."""
    made = [
        Contender(
            f"pairtile {backend}",
            partial(forward_and_backward, partial(_served, name, backend)),
            missing=missing_backend(backend),
            ours=True,
        )
        for backend in ("cpp", "torch")
    ]
    made = [next((each for each in made if each.missing is None), made[0])]
    backend = made[0].name.split()[-1]
    made.append(
        Contender(
            LEAN,
            partial(forward_and_backward, partial(_served, name, backend, LEAN_BUDGET)),
            missing=made[0].missing,
            ours=True,
        )
    )
    others = {"DistillClipLoss 2 teachers": "open_clip", "MatryoshkaLoss": "four calls"}
    if name in others:
        missing = missing_peer("open_clip") if others[name] == "open_clip" else None
        made.append(
            Contender(others[name], partial(forward_and_backward, partial(_found, name, others[name])), missing=missing)
        )
    return [
        *made,
        Contender("dense", partial(forward_and_backward, partial(_found, name, "dense"))),
        Contender(
            "dense (compiled)",
            partial(forward_and_backward, partial(_found, name, "compiled")),
            missing=rows()[name].miscompiled or missing_compiler(),
            compiled=True,
        ),
    ]


def dense(name: str) -> Loss:
    """The formula whose float64 is the truth of the error columns."""
    return _found(name, "dense")
