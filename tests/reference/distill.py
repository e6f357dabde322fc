"""MobileCLIP (arXiv:2311.17049): contrast, and cross-entropy against the mean softmax of K teachers."""

from __future__ import annotations

import torch
from torch import Tensor


def contrastive(scores: Tensor) -> Tensor:
    """[N]: of each pair, the mean of both directions' -log softmax."""
    return -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()) / 2


def distillation(scores: Tensor, teachers: list[Tensor]) -> Tensor:
    """[N]: the mean of both directions' cross-entropy; every teacher's own [N, N] similarity."""
    total = 0.0
    for student, taught in ((scores, teachers), (scores.T, [teacher.T for teacher in teachers])):
        target = torch.stack([teacher.softmax(1) for teacher in taught]).mean(0)
        total = total - (target * student.log_softmax(1)).sum(1) / 2
    return total
