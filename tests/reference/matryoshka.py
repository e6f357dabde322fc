"""Matryoshka representations (arXiv:2205.13147): the loss of CLIP on each prefix."""

from __future__ import annotations

from torch import Tensor


def matryoshka(logits, x: Tensor, y: Tensor, widths: list[int], weights: list[float], normalize: bool) -> Tensor:
    """[N]"""
    total = 0.0
    for width, weight in zip(widths, weights):
        prefixes = [each[:, :width] for each in (x, y)]
        if normalize:
            prefixes = [each / each.square().sum(1, keepdim=True).sqrt() for each in prefixes]
        scores = logits(*prefixes)
        total = total - weight * (scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()) / 2
    return total
