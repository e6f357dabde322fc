"""Sums of exponentials by their logarithms, with a gradient of 0, never NaN, where there is nothing to add up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(values: Tensor) -> Tensor:
    """log(1 + exp(values)); 0 at -inf."""
    empty = values.isneginf()
    # F.softplus turns linear above a threshold, with a relative error of 1e-10 that float64 would show.
    return -F.logsigmoid(-values.masked_fill(empty, 0)).masked_fill(empty, 0)


def cross_entropy(others: Tensor, own: Tensor) -> Tensor:
    """-log(exp(own) / (exp(own) + exp(others))), `others` being a log-sum-exp; 0 where that is -inf."""
    # The last term is 0, or NaN where the own score is infinite: softplus(-inf) = 0 would hide that.
    return softplus(others - own) + 0 * own


def log_sum_exp(scores: Tensor) -> Tensor:
    """log sum_k exp(scores[..., k]); -inf where all are."""
    empty = scores.isneginf().all(-1)
    filled = scores.masked_fill(empty.unsqueeze(-1), 0)
    return torch.logsumexp(filled, -1).masked_fill(empty, -torch.inf)


def log_add_exp(first: Tensor, second: Tensor) -> Tensor:
    """log(exp(first) + exp(second)); -inf where both are."""
    return log_sum_exp(torch.stack([first, second], -1))
