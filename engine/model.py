"""The two-tower model: images and texts to vectors of one space, with a learnable scale and bias."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipe import ModelConfig
from .towers import build_text, build_vision, enable_activation_checkpointing, pool_hidden_states, portable


class DualOutput(NamedTuple):
    """What :meth:`DualEncoder.forward` returns.

    ``image_features`` and ``text_features`` are [n, embed_dim] of unit length; ``logit_scale`` [1] is the factor
    itself, not its logarithm; ``logit_bias`` is [1] or None.
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


class DualEncoder(nn.Module):
    """Image tower and text tower, each followed by a linear projection without bias (as in CLIP).

    ``logit_scale`` holds the logarithm of the scale, in shape [1] because DeepSpeed's broadcast refuses 0-dim
    parameters; it stays float32 whatever the precision of training.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, pad_id: int, context_length: int) -> None:
        super().__init__()
        self.vision, vision_dim = build_vision(config.vision)
        self.text, text_dim = build_text(
            config.text, vocab_size=vocab_size, pad_id=pad_id, context_length=context_length
        )
        self.config = portable(config, self.vision, self.text)
        self.vision_projection = nn.Linear(vision_dim, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(text_dim, config.embed_dim, bias=False)
        nn.init.normal_(self.vision_projection.weight, std=vision_dim**-0.5)
        nn.init.normal_(self.text_projection.weight, std=text_dim**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.init_logit_scale)]))
        self.logit_bias = (
            None if config.init_logit_bias is None else nn.Parameter(torch.tensor([config.init_logit_bias]))
        )
        shape = (1, config.vision.channels, 1, 1)
        mean, std = (
            torch.tensor(values[: config.vision.channels]) for values in (config.vision.mean, config.vision.std)
        )
        # images arrive as bytes; (x / 255 - mean) / std is one multiply and one add
        self.register_buffer("pixel_scale", (1 / (255 * std)).view(shape), persistent=False)
        self.register_buffer("pixel_shift", (-mean / std).view(shape), persistent=False)
        self.vision.requires_grad_(not config.vision.frozen)
        self.text.requires_grad_(not config.text.frozen)

    def train(self, mode: bool = True) -> DualEncoder:
        """As nn.Module.train; a frozen tower stays in evaluation mode (no dropout, no batch statistics)."""
        super().train(mode)
        if self.config.vision.frozen:
            self.vision.eval()
        if self.config.text.frozen:
            self.text.eval()
        return self

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images uint8 [n, C, H, W] -> [n, embed_dim], of unit length in float32 unless ``normalize`` is False."""
        pixels = torch.addcmul(self.get_buffer("pixel_shift"), images.float(), self.get_buffer("pixel_scale"))
        if self.config.vision.channels_last:
            # the images alone: ZeRO flattens weights and gradients and needs them contiguous
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self._project(self.vision(pixels), self.vision_projection, normalize)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor, normalize: bool = True) -> Tensor:
        """input_ids int64 [n, L], attention_mask bool [n, L], padding right -> [n, embed_dim]."""
        hidden = self.text(input_ids=input_ids, attention_mask=attention_mask)
        hidden = hidden if isinstance(hidden, Tensor) else hidden.last_hidden_state
        pooled = pool_hidden_states(hidden, attention_mask, self.config.text.pool)
        return self._project(pooled, self.text_projection, normalize)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> DualOutput:
        """One batch of pairs through both towers: row i of ``images`` belongs to row i of the texts."""
        return DualOutput(
            self.encode_image(images), self.encode_text(input_ids, attention_mask), self.scale(), self._bias()
        )

    def scale(self) -> Tensor:
        """The factor of the similarities, exp(logit_scale) <= max_logit_scale, shape [1]."""
        return _UpperBound.apply(self.logit_scale, math.log(self.config.max_logit_scale)).exp()

    def enable_activation_checkpointing(self) -> None:
        enable_activation_checkpointing(self.vision, "model.vision")
        enable_activation_checkpointing(self.text, "model.text")

    def _bias(self) -> Tensor | None:
        # an alias, never the parameter itself: ZeRO-3 frees a parameter's storage when forward ends
        return None if self.logit_bias is None else self.logit_bias * 1.0

    @staticmethod
    def _project(features: Tensor, projection: nn.Linear, normalize: bool) -> Tensor:
        projected = projection(features)
        return F.normalize(projected.float(), dim=-1) if normalize else projected


class _UpperBound(torch.autograd.Function):
    """min(x, bound) whose gradient still reaches x above the bound when it would bring x down again.

    Clamping the parameter after each step, as is usual, does nothing under ZeRO, whose float32 master copy keeps
    the old value; and torch.clamp's zero gradient would leave a parameter above the bound for ever.
    """

    @staticmethod
    def forward(ctx, x: Tensor, bound: float) -> Tensor:  # type: ignore[override, no-untyped-def]
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(max=bound)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override, no-untyped-def]
        (x,) = ctx.saved_tensors
        return torch.where((x < ctx.bound) | (grad > 0), grad, torch.zeros_like(grad)), None
