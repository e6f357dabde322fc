"""timm's vision transformers: how their blocks split into halves, and how merged tokens are pooled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor

from .attention import AttentionTo
from .layers import Merging, MergingLayer, Site
from .tokens import Tokens


class MergingBlock(MergingLayer, Block):  # type: ignore[misc]
    unpatched = Block

    def attention_half(self, tokens: Tokens, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        _refuse_masks(attn_mask, is_causal)
        return tokens.x + self.drop_path1(self.ls1(self.attn(self.norm1(tokens.x))))

    def mlp_half(self, x: Tensor) -> Any:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class MergingResPostBlock(MergingLayer, ResPostBlock):  # type: ignore[misc]
    unpatched = ResPostBlock

    def attention_half(self, tokens: Tokens, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        _refuse_masks(attn_mask, is_causal)
        return tokens.x + self.drop_path1(self.norm1(self.attn(tokens.x)))

    def mlp_half(self, x: Tensor) -> Any:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class MergingEvaBlock(MergingLayer, EvaBlock):  # type: ignore[misc]
    unpatched = EvaBlock

    def attention_half(
        self, tokens: Tokens, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Any:
        _refuse_masks(attn_mask, is_causal)
        attended = self.attn(self.norm1(tokens.x), rope=_followed(rope, tokens, self.attn.num_prefix_tokens))
        return tokens.x + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)

    def mlp_half(self, x: Tensor) -> Any:
        found = self.mlp(self.norm2(x))
        return x + self.drop_path2(found if self.gamma_2 is None else self.gamma_2 * found)


class MergingEvaBlockPostNorm(MergingLayer, EvaBlockPostNorm):  # type: ignore[misc]
    unpatched = EvaBlockPostNorm

    def attention_half(
        self, tokens: Tokens, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Any:
        _refuse_masks(attn_mask, is_causal)
        attended = self.attn(tokens.x, rope=_followed(rope, tokens, self.attn.num_prefix_tokens))
        return tokens.x + self.drop_path1(self.norm1(attended))

    def mlp_half(self, x: Tensor) -> Any:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


def _followed(rope: Tensor | None, tokens: Tokens, prefix: int) -> Tensor | None:
    if rope is None or tokens.origin is None or not tokens.merged:
        return rope
    return rotary_of(rope, tokens.origin, prefix)


def rotary_of(rope: Tensor, origin: Tensor, prefix: int) -> Tensor:
    """The rotary embedding of tokens that stay: each is turned as the token was that it kept its place from.

    A mean of the merged tokens' sines and cosines would be no rotation.

    Args:
        rope: [N, D] for all samples and heads, [H, N, D] for all samples, or [B, 1 or H, N, D]; N patches.
        origin: [B, S] of class tokens, registers and then patches.
        prefix: how many of them have no position.
    """
    patches = origin[:, prefix:] - prefix
    if rope.dim() == 4:
        return torch.take_along_dim(rope, patches[:, None, :, None], dim=2)
    return rope[patches].unsqueeze(1) if rope.dim() == 2 else rope[:, patches].transpose(0, 1)


class _MergingModel:
    """What a patched model pools: means by size, and attention pooling by size where attention is proportional."""

    merging: Merging

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        model: Any = self
        pool: Callable[..., Tensor] = super().pool  # type: ignore[misc]
        size, attends = self.merging.size, model.attn_pool is not None
        if size is None or size.shape[:2] != x.shape[:2]:
            return pool(x, pool_type)
        # Eva's attention pooling takes prefix tokens too, its mean does not; the others say so by an option.
        whole = attends if isinstance(self, Eva) else model.pool_include_prefix
        counted = size if whole else size[:, model.num_prefix_tokens :]
        if attends:
            with AttentionTo(counted) if self.merging.proportional else nullcontext():
                return pool(x, pool_type)
        kind = model.global_pool if pool_type is None else pool_type
        if kind not in ("avg", "avgmax"):
            return pool(x, kind)
        wide = torch.promote_types(x.dtype, torch.float32)
        share = size.to(wide) / counted.to(wide).mean(1, keepdim=True)
        mean = pool(x * share.to(x.dtype), "avg")
        return mean if kind == "avg" else 0.5 * (mean + pool(x, "max"))

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("feature maps need all tokens, and this model merges them: unpatch it first")


class MergingVisionTransformer(_MergingModel, VisionTransformer):
    unpatched = VisionTransformer


class MergingVisionTransformerDistilled(_MergingModel, VisionTransformerDistilled):
    unpatched = VisionTransformerDistilled


class MergingEva(_MergingModel, Eva):
    unpatched = Eva


_MODELS = {each.unpatched: each for each in (MergingVisionTransformer, MergingVisionTransformerDistilled, MergingEva)}
_BLOCKS = {
    each.unpatched: each for each in (MergingBlock, MergingResPostBlock, MergingEvaBlock, MergingEvaBlockPostNorm)
}
_ATTENTIONS = (Attention, AttentionRope, EvaAttention)


def site_of(model: Any) -> Site:
    """Where a timm model is patched.

    Raises:
        TypeError: a model, a block or an attention that is none of those known here.
        ValueError: options of the model that do not go with merged tokens.
    """
    if type(model) not in _MODELS:
        known = ", ".join(each.__name__ for each in _MODELS)
        raise TypeError(f"a timm {type(model).__name__}: of timm's models {known} can be patched")
    for block in model.blocks:
        attention = type(getattr(block, "attn", None))
        if type(block) not in _BLOCKS or attention not in _ATTENTIONS:
            blocks, attentions = (", ".join(each.__name__ for each in known) for known in (_BLOCKS, _ATTENTIONS))
            raise TypeError(f"a {type(block).__name__} with {attention.__name__}: expected {blocks}, with {attentions}")
        if not block.attn.fused_attn:
            raise ValueError(
                "the model was made without timm's fused attention, by which sizes are counted: call "
                "timm.layers.set_fused_attn(True) before making it, or set fused_attn of its attentions"
            )
    if getattr(model.attn_pool, "pos_embed", None) is not None:
        raise ValueError("the model's attention pooling adds a position to each place, and merged tokens have none")
    return Site(
        model_class=_MODELS[type(model)],
        layers=[(block, _BLOCKS[type(block)]) for block in model.blocks],
        # Without a norm of its own this is an identity; keys pass it before they are turned.
        keys=[block.attn.k_norm for block in model.blocks],
        heads=[block.attn.num_heads for block in model.blocks],
        protected=model.num_prefix_tokens,
        rotary=getattr(model, "rope", None) is not None,
    )


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError(
            "an attention mask or a causal order says nothing of merged tokens: unpatch the model to use it"
        )
