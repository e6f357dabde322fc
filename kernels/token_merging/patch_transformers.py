"""transformers' vision and text encoders: how their layers split into halves, and which masks they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer, BertModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer, Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersModel,
)
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionModel
from transformers.models.vit.modeling_vit import ViTLayer, ViTModel

from .attention import size_bias
from .layers import MergingLayer, Site
from .tokens import Tokens

_IMPLEMENTATIONS = ("sdpa", "eager")


class _MaskedLayer(MergingLayer):
    """A layer that takes transformers' attention mask [B, 1, Q, K], equal for all queries, behind the tokens."""

    def padding(self, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
        if attention_mask is None:
            return None
        row = attention_mask[:, 0, 0]
        return row if row.dtype == torch.bool else row >= 0

    def mask(self, tokens: Tokens, given: Tensor | None, implementation: str) -> Tensor | None:
        """Before the first merge the library's own; then None, as fused attention counts sizes, or their logarithms."""
        size = tokens.attention_size(self.merging.model.proportional)
        if not tokens.merged:
            return given
        if implementation != "eager" or size is None:
            return None
        return size_bias(size, tokens.x.dtype)[:, None, None, :]


class MergingCLIPEncoderLayer(_MaskedLayer, CLIPEncoderLayer):  # type: ignore[misc, no-untyped-call]
    unpatched = CLIPEncoderLayer

    def attention_half(self, tokens: Tokens, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        mask = self.mask(tokens, attention_mask, self.self_attn.config._attn_implementation)
        return tokens.x + self.self_attn(self.layer_norm1(tokens.x), attention_mask=mask, **kwargs)[0]

    def mlp_half(self, x: Tensor) -> Any:
        return x + self.mlp(self.layer_norm2(x))


class MergingSiglipEncoderLayer(_MaskedLayer, SiglipEncoderLayer):  # type: ignore[misc, no-untyped-call]
    unpatched = SiglipEncoderLayer
    attention_half = MergingCLIPEncoderLayer.attention_half
    mlp_half = MergingCLIPEncoderLayer.mlp_half


class MergingViTLayer(_MaskedLayer, ViTLayer):  # type: ignore[misc, no-untyped-call]
    unpatched = ViTLayer

    def attention_half(self, tokens: Tokens, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        mask = self.mask(tokens, attention_mask, self.attention.config._attn_implementation)
        return self.dropout(self.attention(self.layernorm_before(tokens.x), mask, **kwargs)[0]) + tokens.x

    def mlp_half(self, x: Tensor) -> Any:
        return self.dropout(self.mlp(self.layernorm_after(x))) + x


class MergingDinov2Layer(_MaskedLayer, Dinov2Layer):  # type: ignore[misc, no-untyped-call]
    unpatched = Dinov2Layer

    def attention_half(self, tokens: Tokens, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        mask = self.mask(tokens, attention_mask, self.attention.config._attn_implementation)
        attended = self.attention(self.norm1(tokens.x), attention_mask=mask, **kwargs)[0]
        return self.drop_path(self.layer_scale1(attended)) + tokens.x

    def mlp_half(self, x: Tensor) -> Any:
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(x)))) + x


class MergingDinov2WithRegistersLayer(_MaskedLayer, Dinov2WithRegistersLayer):  # type: ignore[misc, no-untyped-call]
    unpatched = Dinov2WithRegistersLayer
    attention_half = MergingDinov2Layer.attention_half
    mlp_half = MergingDinov2Layer.mlp_half


class MergingBertLayer(_MaskedLayer, BertLayer):  # type: ignore[misc, no-untyped-call]
    unpatched = BertLayer

    def attention_half(
        self,
        tokens: Tokens,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: object | None = None,
        **kwargs: Any,
    ) -> Any:
        if encoder_hidden_states is not None or past_key_values is not None:
            raise ValueError("merged tokens have no cross-attention and no cache: unpatch the model to use them")
        mask = self.mask(tokens, attention_mask, self.attention.self.config._attn_implementation)
        return self.attention(tokens.x, mask, **kwargs)[0]

    def mlp_half(self, x: Tensor) -> Any:
        return self.feed_forward_chunk(x)  # type: ignore[no-untyped-call]


class MergingRobertaLayer(_MaskedLayer, RobertaLayer):  # type: ignore[misc, no-untyped-call]
    unpatched = RobertaLayer
    attention_half = MergingBertLayer.attention_half
    mlp_half = MergingBertLayer.mlp_half


class _Family(NamedTuple):
    """Of a model class: its layers by path, each one's attention and keys by path, and its first tokens that stay."""

    layer: Any
    layers: str
    attention: str
    keys: str
    protected: Callable[[Any], int] = lambda config: 1


_FAMILIES = {
    CLIPVisionModel: _Family(MergingCLIPEncoderLayer, "encoder.layers", "self_attn", "k_proj"),
    SiglipVisionModel: _Family(MergingSiglipEncoderLayer, "encoder.layers", "self_attn", "k_proj", lambda config: 0),
    ViTModel: _Family(MergingViTLayer, "layers", "attention", "k_proj"),
    Dinov2Model: _Family(MergingDinov2Layer, "encoder.layer", "attention", "k_proj"),
    Dinov2WithRegistersModel: _Family(
        MergingDinov2WithRegistersLayer,
        "encoder.layer",
        "attention",
        "k_proj",
        lambda config: 1 + config.num_register_tokens,
    ),
    BertModel: _Family(MergingBertLayer, "encoder.layer", "attention.self", "key"),
    RobertaModel: _Family(MergingRobertaLayer, "encoder.layer", "attention.self", "key"),
}


def site_of(model: Any) -> Site:
    """Where a model of transformers is patched.

    Raises:
        TypeError: a model that is none of those known here, or has other layers.
        ValueError: a decoder, or an attention implementation that sizes cannot be given to.
    """
    if type(model) not in _FAMILIES:
        known = ", ".join(each.__name__ for each in _FAMILIES)
        raise TypeError(
            f"a {type(model).__name__} of transformers: expected {known}; of a model that holds one, give that, "
            "such as clip.vision_model"
        )
    family, config = _FAMILIES[type(model)], model.config
    if getattr(config, "is_decoder", False):
        raise ValueError(
            f"this {type(model).__name__} is a decoder: each token of a causal order would hold later ones"
        )
    if config._attn_implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {config._attn_implementation!r}: expected {' or '.join(_IMPLEMENTATIONS)}; call "
            'model.set_attn_implementation("sdpa"), which runs flash kernels on merged tokens too'
        )
    try:
        layers: list[nn.Module] = list(model.get_submodule(family.layers))
        attentions: list[nn.Module] = [layer.get_submodule(family.attention) for layer in layers]
        keys = [attention.get_submodule(family.keys) for attention in attentions]
    except AttributeError as error:
        raise TypeError(
            f"this {type(model).__name__} has its layers, attentions or keys elsewhere ({error}): transformers "
            f"{transformers.__version__} lays it out otherwise than version 5.23, which is known here"
        ) from None
    if any(type(layer) is not family.layer.unpatched for layer in layers):
        raise TypeError(f"layers {type(layers[0]).__name__}: expected {family.layer.unpatched.__name__}")
    return Site(
        model_class=None,
        layers=[(layer, family.layer) for layer in layers],
        keys=keys,
        heads=[config.num_attention_heads] * len(layers),
        protected=family.protected(config),
        pooling=model.head.attention if isinstance(model, SiglipVisionModel) and model.use_head else None,
    )
