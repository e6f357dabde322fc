"""Soft targets from a second similarity: ALBEF (arXiv:2107.07651) without queues, SoftCLIP (arXiv:2305.18274)."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_target(scores: Tensor, teacher: Tensor, alpha: float, weights=(0.5, 0.5)) -> Tensor:
    """[N]: -sum_j y_ij log softmax_j(s_ij), y = alpha softmax(teacher) + (1 - alpha) one-hot, both directions."""
    total = 0.0
    for weight, student, taught in ((weights[0], scores, teacher), (weights[1], scores.T, teacher.T)):
        one_hot = torch.eye(*student.shape, dtype=student.dtype)
        target = alpha * taught.softmax(1) + (1 - alpha) * one_hot
        total = total - weight * (target * student.log_softmax(1)).sum(1)
    return total


def soft_clip(scores: Tensor, targets: Tensor, scale: float) -> Tensor:
    """[N]: the target of row i is softmax_j(scale <t_i, t_j>), of the fixed targets t [N, D]."""
    between = scale * targets @ targets.T
    return -(between.softmax(1) * (scores.log_softmax(1) + scores.T.log_softmax(1))).sum(1) / 2
