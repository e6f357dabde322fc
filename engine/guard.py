"""Keeps a gradient that is not finite away from the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GradientGuard:
    """Replaces a parameter's gradient by zeros when it holds NaN or inf, and remembers that it happened.

    A finite loss does not promise finite gradients (an overflow in backward, a kernel that reads uninitialised
    memory: oneDNN's bf16 convolution of 1 x 1 images with stride 2 does). One such gradient would turn weights
    and optimiser state into NaN, and the next checkpoint with them. DeepSpeed checks for it under fp16 only. The
    hook runs before any reduction, so it works for every ZeRO stage and names the rank; it costs one reading and
    one writing of each gradient and never waits for the device.
    """

    def __init__(self, module: nn.Module) -> None:
        self._bad: Tensor | None = None
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._check)

    def take(self) -> bool:
        """Whether a gradient was replaced since the last call."""
        bad, self._bad = self._bad, None
        return bad is not None and bool(bad)

    def _check(self, gradient: Tensor) -> Tensor:
        finite = torch.isfinite(gradient).all()
        self._bad = ~finite if self._bad is None else self._bad | ~finite
        return torch.where(finite, gradient, 0.0)
