"""Losses against soft targets, distances and prefixes in plain PyTorch, as one writes them with the logits in memory.

What the library's classes of the same names are compared with. One product where one does, both directions from one
matrix; value and options as the class has by default, in the mean over the batch. torch.compile takes all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _labels(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[0], device=logits.device)


def _symmetric_cross_entropy(logits: Tensor) -> Tensor:
    labels = _labels(logits)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _soft_cross_entropy(logits: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """Both directions; the targets [N, N] lie along the last dimension in both."""
    return (F.cross_entropy(logits, of_rows) + F.cross_entropy(logits.T, of_columns)) / 2


@torch.no_grad()
def _soft_targets(teacher_logits: Tensor, alpha: float) -> Tensor:
    """alpha * softmax + (1 - alpha) on the pair; [N, N + queue]."""
    targets = alpha * teacher_logits.softmax(1)
    targets.diagonal().add_(1 - alpha)
    return targets


def distill_clip_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    teacher_images: Sequence[Tensor],
    teacher_texts: Sequence[Tensor],
    teacher_scales: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """(contrastive, distillation); `DistillClipLoss`."""
    logits = scale * images @ texts.T
    with torch.no_grad():
        teachers = [s * x @ y.T for x, y, s in zip(teacher_images, teacher_texts, teacher_scales, strict=True)]
        of_rows, of_columns = (sum(t.softmax(dim) for t in teachers) / len(teachers) for dim in (1, 0))
    return _symmetric_cross_entropy(logits), _soft_cross_entropy(logits, of_rows, of_columns.T)


def soft_target_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    teacher_scale: float,
    alpha: float = 1.0,
) -> Tensor:
    """`SoftTargetLoss`."""
    teacher_logits = teacher_scale * teacher_images @ teacher_texts.T
    targets = (_soft_targets(each, alpha) for each in (teacher_logits, teacher_logits.T))
    return _soft_cross_entropy(scale * images @ texts.T, *targets)


def soft_clip_loss(images: Tensor, texts: Tensor, scale: Tensor, target_scale: float) -> Tensor:
    """`SoftClipLoss`."""
    fixed = texts.detach()
    targets = (target_scale * fixed @ fixed.T).softmax(1)
    return _soft_cross_entropy(scale * images @ texts.T, targets, targets)


def momentum_distillation_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    momentum_images: Tensor,
    momentum_texts: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    alpha: float = 0.4,
) -> Tensor:
    """`MomentumDistillationLoss`."""
    all_images, all_texts = torch.cat([momentum_images, image_queue]), torch.cat([momentum_texts, text_queue])
    fixed = scale.detach()
    of_images = _soft_targets(fixed * momentum_images @ all_texts.T, alpha)
    of_texts = _soft_targets(fixed * momentum_texts @ all_images.T, alpha)
    loss = F.cross_entropy(scale * images @ all_texts.T, of_images)
    return (loss + F.cross_entropy(scale * texts @ all_images.T, of_texts)) / 2


def cwcl_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """`CWCLLoss`, the images' tower locked."""
    logits = scale * images @ texts.T
    with torch.no_grad():
        weights = images @ images.T / 2 + 0.5
        weights /= weights.sum(1, keepdim=True)
    return F.cross_entropy(logits, weights) + F.cross_entropy(logits.T, _labels(logits))


def sdm_loss(images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor, eps: float = 1e-8) -> Tensor:
    """`SDMLoss`, of aligned images and texts."""
    logits = scale * images @ texts.T
    same = (ids[:, None] == ids).to(logits.dtype)
    log_target = (same / same.sum(1, keepdim=True) + eps).log()
    log_rows, log_columns = logits.log_softmax(1), logits.T.log_softmax(1)
    loss = (log_rows.exp() * (log_rows - log_target)).sum(1) + (log_columns.exp() * (log_columns - log_target)).sum(1)
    return loss.mean()


def mod_x_loss(
    images: Tensor, texts: Tensor, scale: Tensor, old_images: Tensor, old_texts: Tensor, old_scale: float
) -> Tensor:
    """`ModXLoss`."""
    logits = scale * images @ texts.T
    with torch.no_grad():
        old_logits = old_scale * old_images @ old_texts.T
    loss = _symmetric_cross_entropy(logits)
    for dim in (1, 0):
        divergence = F.kl_div(
            logits.log_softmax(dim), old_logits.log_softmax(dim), reduction="none", log_target=True
        ).sum(dim)
        loss = loss + (divergence * (old_logits.argmax(dim) == _labels(logits))).mean() / 2
    return loss


def vicinity_mix_loss(images: Tensor, texts: Tensor, scale: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    """`VicinityMixLoss`."""
    logits = scale * images @ texts.T
    targets = torch.diag(lam).scatter_add(1, perm[:, None], (1 - lam)[:, None])
    return _soft_cross_entropy(logits, targets, targets.T)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T


def cacr_loss(images: Tensor, texts: Tensor, ids: Tensor, tau_pos: float = 1.0, tau_neg: float = 1.0) -> Tensor:
    """`CACRLoss`, of aligned x and y."""
    distances, same = _squared_distances(images, texts), ids[:, None] == ids
    loss = distances.new_zeros(())
    for dim in (1, 0):
        far = (tau_pos * distances).masked_fill(~same, -torch.inf).softmax(dim)
        close = (-tau_neg * distances).masked_fill(same, -torch.inf).softmax(dim)
        loss = loss + ((far - close) * distances).sum(dim).mean() / 2
    return loss


def alignment_uniformity_loss(images: Tensor, texts: Tensor, scale: Tensor, t: float = 2.0) -> Tensor:
    """`AlignmentUniformityLoss`, its form CUAXU."""
    n = images.shape[0]
    itself = torch.eye(n, dtype=torch.bool, device=images.device)
    logits = images @ texts.T
    norms = images.square().sum(1), texts.square().sum(1)

    def uniformity(products: Tensor, x: Tensor, y: Tensor) -> Tensor:
        exponents = (t * (2 * products - x[:, None] - y)).masked_fill(itself, -torch.inf)
        return exponents.flatten().logsumexp(0) - math.log(n * (n - 1))

    within = uniformity(images @ images.T, norms[0], norms[0]) + uniformity(texts @ texts.T, norms[1], norms[1])
    aligned = (images - texts).square().sum(1).mean()
    return _symmetric_cross_entropy(scale * logits) + aligned + within / 2 + uniformity(logits, *norms)


def matryoshka_loss(images: Tensor, texts: Tensor, scale: Tensor, widths: Sequence[int]) -> Tensor:
    """`MatryoshkaLoss`."""
    loss = images.new_zeros(())
    for width in widths:
        x, y = F.normalize(images[:, :width], dim=-1), F.normalize(texts[:, :width], dim=-1)
        loss = loss + _symmetric_cross_entropy(scale * x @ y.T)
    return loss
