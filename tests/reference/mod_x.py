"""Mod-X (arXiv:2305.07437): KL(softmax(old) || softmax(new)) of the rows where the old model is right."""

from __future__ import annotations

import torch
from torch import Tensor


def mod_x(scores: Tensor, old: Tensor, distill_weight: float, clip_loss_weight: float) -> Tensor:
    """[N]: the mean of both directions."""
    total = 0.0
    for student, teacher in ((scores, old), (scores.T, old.T)):
        log_student, log_teacher = student.log_softmax(1), teacher.log_softmax(1)
        terms = []
        for i in range(len(student)):
            term = -clip_loss_weight * log_student[i, i]
            if teacher[i].tolist().index(teacher[i].max().item()) == i:
                term = term + distill_weight * (log_teacher[i].exp() * (log_teacher[i] - log_student[i])).sum()
            terms.append(term)
        total = total + torch.stack(terms) / 2
    return total
