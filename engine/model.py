"""The two-tower model: images and texts to vectors of one space, with a learnable scale and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.token_merging import CrossTokens
from .clips import add_frame_positions, check_clips, mean_over_clip, tokens_of_clip
from .errors import PairtileError
from .merging import cross_tokens_of, merge_tokens_in
from .recipe import ModelConfig
from .tokens import FeatureMap, Tokens, mean_of_tokens, patch_tokens, return_feature_map, word_mask
from .towers import build_text, build_vision, enable_activation_checkpointing, pool_hidden_states, portable


class DualOutput(NamedTuple):
    """What :meth:`DualEncoder.forward` returns.

    ``image_features`` and ``text_features`` are [n, embed_dim] of unit length; ``logit_scale`` [1] is the factor
    itself, not its logarithm; ``logit_bias`` is [1] or None. With ``model.tokens``: ``image_tokens`` [n, patches, dim] and
    ``text_tokens`` [n, L, dim] of unit length, ``text_mask`` bool [n, L]; every patch counts. With ``cross_tokens`` in both
    towers: ``image_cross`` and ``text_cross`` [n, layers, embed_dim].
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None
    image_tokens: Tensor | None = None
    text_tokens: Tensor | None = None
    text_mask: Tensor | None = None
    image_cross: Tensor | None = None
    text_cross: Tensor | None = None

    def embeddings(self) -> list[Tensor]:
        """All embeddings of the batch."""
        every = (self.image_features, self.text_features, self.image_tokens, self.text_tokens)
        return [each for each in every if each is not None]

    def without_rows(self) -> DualOutput:
        """The same of no pair, with the graph of these."""
        rows = {name: each for name, each in self._asdict().items() if name not in ("logit_scale", "logit_bias")}
        return self._replace(**{name: each[:0] for name, each in rows.items() if each is not None})


class Embedded(NamedTuple):
    """One side of a batch: ``pooled`` [n, embed_dim], and with ``model.tokens`` what its tokens are."""

    pooled: Tensor
    tokens: Tokens | None


class DualEncoder(nn.Module):
    """Image tower and text tower, each followed by a linear projection without bias (as in CLIP).

    With ``config.tokens`` there are two more, of the patches and of the words (as in FILIP). Where ``config.embed_dim`` is
    None those are the only ones, and the pooled embedding of an image or a text is the mean of its tokens', normalised.

    With ``frames`` an image is a clip [n, frames, C, H, W]. The image tower takes its frames as images, and the features
    that it returns for a clip are averaged: one for each frame, or fewer where ``token_merging.clips`` joins them. So are
    cross tokens.

    ``logit_scale`` holds the logarithm of the scale, in shape [1] because DeepSpeed's broadcast refuses 0-dim
    parameters; it stays float32 whatever the precision of training.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        pad_id: int,
        context_length: int,
        special_ids: Sequence[int] = (),
        frames: int | None = None,
    ) -> None:
        super().__init__()
        self.frames = frames
        self.vision, vision_dim, self.patch_dim = build_vision(config.vision)
        self.text, text_dim = build_text(
            config.text, vocab_size=vocab_size, pad_id=pad_id, context_length=context_length
        )
        self.config = portable(config, self.vision, self.text)
        self.vision_projection, self.text_projection = _projections(vision_dim, text_dim, config.embed_dim)
        token_dim = None if config.tokens is None else config.tokens.dim
        self.patch_projection, self.word_projection = _projections(self.patch_dim, text_dim, token_dim)
        if config.tokens is not None and config.vision.target is None:
            return_feature_map(self.vision)
        self.frame_positions = add_frame_positions(self.vision, frames)
        self.image_cross = cross_tokens_of(self.vision, config.vision.token_merging, "model.vision")
        self.text_cross = cross_tokens_of(self.text, config.text.token_merging, "model.text")
        self.merge_tokens(config)
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
        words = config.tokens is not None and not config.tokens.special_tokens
        self.register_buffer(
            "special_ids", torch.tensor(special_ids if words else [], dtype=torch.int64), persistent=False
        )
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

    def merge_tokens(self, config: ModelConfig, *, trace_source: bool = False) -> None:
        """Merge tokens in both towers as ``config`` says, whatever they did before; the weights stay as they are.

        ``trace_source`` keeps, of the image tower, what ``merged_sources`` of ``pairtile.kernels.token_merging`` returns.

        Raises:
            PairtileError: a tower whose tokens cannot be merged so.
        """
        vision, text = config.vision.token_merging, config.text.token_merging
        merge_tokens_in(
            self.vision,
            vision,
            "model.vision",
            cross_tokens=self.image_cross,
            frames=self.frames,
            trace_source=trace_source,
        )
        # pooling by the mask, and late interaction, find every word at its place
        merge_tokens_in(self.text, text, "model.text", cross_tokens=self.text_cross, restore=True)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images uint8 [n, C, H, W], or clips [n, T, C, H, W] -> [n, embed_dim], of unit length in float32 unless ``normalize`` is False."""
        return self.embed_image(images, normalize).pooled

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor, normalize: bool = True) -> Tensor:
        """input_ids int64 [n, L], attention_mask bool [n, L], padding right -> [n, embed_dim]."""
        return self.embed_text(input_ids, attention_mask, normalize).pooled

    def encode_image_tokens(self, images: Tensor, normalize: bool = True) -> Tokens:
        """images uint8 [n, C, H, W] -> the embeddings of their patches. Raises without ``model.tokens``."""
        return required_tokens(self.embed_image(images, normalize).tokens)

    def encode_text_tokens(self, input_ids: Tensor, attention_mask: Tensor, normalize: bool = True) -> Tokens:
        """input_ids int64 [n, L], attention_mask bool [n, L] -> the embeddings of their words. Raises as above."""
        return required_tokens(self.embed_text(input_ids, attention_mask, normalize).tokens)

    def embed_image(self, images: Tensor, normalize: bool = True) -> Embedded:
        """Both kinds of embeddings of images uint8 [n, C, H, W], or clips, from one pass through the tower."""
        check_clips(images, self.frames)
        pixels = torch.addcmul(self.get_buffer("pixel_shift"), images.float(), self.get_buffer("pixel_scale"))
        if self.frames is not None:
            pixels = pixels.flatten(0, 1)
        if self.config.vision.channels_last:
            # the images alone: ZeRO flattens weights and gradients and needs them contiguous
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        features = self.vision(pixels)
        if self.config.tokens is None:
            features = mean_over_clip(features, len(images))
            return Embedded(_projected(features, self.vision_projection, normalize), None)
        pooled, features = features if isinstance(features, FeatureMap) else (None, features)
        patches = patch_tokens(features, self.vision, self.patch_dim, prefix_tokens=self.config.tokens.prefix_tokens)
        patches = tokens_of_clip(patches, len(images))
        tokens = Tokens(
            _projected(patches, self.patch_projection, normalize),
            torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device),
        )
        if self.vision_projection is None:
            return Embedded(mean_of_tokens(tokens, normalize), tokens)
        pooled = patches.mean(1) if pooled is None else mean_over_clip(pooled, len(images))
        return Embedded(_projected(pooled, self.vision_projection, normalize), tokens)

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor, normalize: bool = True) -> Embedded:
        """Both kinds of embeddings of texts, as in :meth:`encode_text`, from one pass through the tower."""
        hidden = self.text(input_ids=input_ids, attention_mask=attention_mask)
        hidden = hidden if isinstance(hidden, Tensor) else hidden.last_hidden_state
        tokens = None
        if self.config.tokens is not None:
            if hidden.dim() != 3:
                raise PairtileError(
                    f"model.tokens: the text tower gives features of shape {list(hidden.shape)}; expected hidden states "
                    "[n, tokens, width], which are not pooled"
                )
            words = word_mask(input_ids, attention_mask, self.get_buffer("special_ids"))
            tokens = Tokens(_projected(hidden, self.word_projection, normalize), words)
            if self.text_projection is None:
                return Embedded(mean_of_tokens(tokens, normalize), tokens)
        pooled = pool_hidden_states(hidden, attention_mask, self.config.text.pool)
        return Embedded(_projected(pooled, self.text_projection, normalize), tokens)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> DualOutput:
        """One batch of pairs through both towers: row i of ``images`` belongs to row i of the texts."""
        image, text = self.embed_image(images), self.embed_text(input_ids, attention_mask)
        image_cross = _cross_embeddings(self.image_cross, self.vision_projection)
        output = DualOutput(
            image.pooled,
            text.pooled,
            self.scale(),
            self._bias(),
            image_cross=None if image_cross is None else mean_over_clip(image_cross, len(images)),
            text_cross=_cross_embeddings(self.text_cross, self.text_projection),
        )
        if image.tokens is None or text.tokens is None:
            return output
        # every patch counts: no mask says so faster
        return output._replace(
            image_tokens=image.tokens.tokens, text_tokens=text.tokens.tokens, text_mask=text.tokens.mask
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


def _projections(image_width: int, text_width: int, dim: int | None) -> tuple[nn.Linear | None, nn.Linear | None]:
    if dim is None:
        return None, None
    image, text = nn.Linear(image_width, dim, bias=False), nn.Linear(text_width, dim, bias=False)
    for projection in (image, text):
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    return image, text


def _projected(features: Tensor, projection: nn.Linear | None, normalize: bool) -> Tensor:
    assert projection is not None
    projected: Tensor = projection(features)
    return F.normalize(projected.float(), dim=-1) if normalize else projected


def _cross_embeddings(cross: CrossTokens | None, projection: nn.Linear | None) -> Tensor | None:
    """[n, layers, embed_dim]: cross tokens by the projection of the embeddings, which learns nothing from them."""
    if cross is None or projection is None:
        return None
    tokens = cross.tokens().transpose(0, 1)
    learns = projection.weight.requires_grad
    # not a detached weight in F.linear: ZeRO-3 gathers weights where their module is called
    projection.weight.requires_grad_(False)
    try:
        found: Tensor = projection(F.layer_norm(tokens, tokens.shape[-1:]))
    finally:
        projection.weight.requires_grad_(learns)
    return found


def required_tokens(tokens: Tokens | None) -> Tokens:
    """The tokens. Raises :class:`PairtileError` where the model has none."""
    if tokens is None:
        raise PairtileError("this model has no token embeddings; train one whose recipe sets model.tokens.dim")
    return tokens


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
