"""ALBEF (arXiv:2107.07651): queries against momentum keys and a queue, targets from the momentum model."""

from __future__ import annotations

import torch
from torch import Tensor


def direction(logits, query: Tensor, momentum_query: Tensor, keys: Tensor, alpha: float) -> Tensor:
    """[N]: keys [N + Q, D], of the batch and then of the queue."""
    scores = logits(query, keys)
    momentum_scores = logits.scale.detach() * momentum_query @ keys.T
    one_hot = torch.eye(*scores.shape, dtype=scores.dtype)
    target = alpha * momentum_scores.softmax(1) + (1 - alpha) * one_hot
    return -(target * scores.log_softmax(1)).sum(1)
