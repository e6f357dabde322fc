"""AdamW with decay groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from .errors import PairtileError
from .recipe import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters. Vectors and scalars (biases, norms, logit_scale) do not decay.

    Raises:
        PairtileError: every parameter is frozen.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (no_decay if parameter.ndim <= 1 else decay).append(parameter)
    if not decay and not no_decay:
        raise PairtileError("every parameter is frozen: nothing to train (model.vision.frozen, model.text.frozen)")
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of optimiser step ``step`` (from 0): linear warm-up, then a half cosine down to min_lr, or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))
