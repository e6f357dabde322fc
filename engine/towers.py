"""Image and text towers: timm, transformers, or any nn.Module by import path."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import PairtileError
from .recipe import ModelConfig, TextConfig, VisionConfig


def build_vision(config: VisionConfig) -> tuple[nn.Module, int, int]:
    """The image tower, the width of its pooled features and that of its tokens.

    Raises:
        PairtileError: timm does not know the model, or refuses the arguments.
    """
    if config.target is not None:
        return (
            _from_import_path(config.target, config.args, "model.vision"),
            cast(int, config.out_dim),
            cast(int, config.out_dim),
        )
    import timm

    args: dict[str, Any] = {"num_classes": 0, "in_chans": config.channels, **config.args}
    try:
        tower: Any = timm.create_model(cast(str, config.model), pretrained=config.pretrained, **args)
    except Exception as error:  # timm raises many kinds for arguments that do not fit
        raise PairtileError(_refused("model.vision", f"timm model {config.model}", args, error)) from None
    return tower, getattr(tower, "head_hidden_size", None) or tower.num_features, tower.num_features


def build_text(config: TextConfig, *, vocab_size: int, pad_id: int, context_length: int) -> tuple[nn.Module, int]:
    """The text tower and the width of its hidden states; sizes that the recipe leaves open come from the tokenizer.

    Raises:
        PairtileError: transformers does not know the model, or its vocabulary or length is too small.
    """
    if config.target is not None:
        return _from_import_path(config.target, config.args, "model.text"), cast(int, config.out_dim)
    from transformers import AutoConfig

    name, args = cast(str, config.model), dict(config.args)
    try:
        if _is_stored(name):
            stored = AutoConfig.from_pretrained(name, **args)
            # a dual encoder's folder holds both towers: its text part is what is wanted
            text_config = stored.get_text_config() if hasattr(stored, "text_config") else stored
        else:
            args.setdefault("vocab_size", vocab_size)
            args.setdefault("max_position_embeddings", context_length)
            args.setdefault("pad_token_id", pad_id)
            if "clip" in name:
                # their defaults lie outside a small vocabulary; the pooled output they select is not used here
                args.setdefault("bos_token_id", pad_id)
                args.setdefault("eos_token_id", pad_id)
            text_config = AutoConfig.for_model(name, **args)
        tower = _text_model(config, text_config)
    except Exception as error:  # so does transformers: unknown types, missing files, sizes that do not fit
        raise PairtileError(_refused("model.text", f"transformers model {config.model}", args, error)) from None
    if text_config.vocab_size < vocab_size:
        raise PairtileError(
            f"model.text.args.vocab_size is {text_config.vocab_size}, but the tokenizer has {vocab_size} tokens; "
            "leave the key out or raise it"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and positions < context_length:
        raise PairtileError(
            f"data.context_length is {context_length}, but the text tower has {positions} positions; "
            "lower it or raise model.text.args.max_position_embeddings"
        )
    return tower, text_config.hidden_size


def portable(config: ModelConfig, vision: nn.Module, text: nn.Module) -> ModelConfig:
    """The configuration with local folders and hub ids replaced by what was found there.

    A model that is written to disk must be buildable where those folders are not.
    """
    config = config.model_copy(deep=True)
    if config.vision.model is not None and ":" in config.vision.model:
        config.vision.model = cast(Any, vision).pretrained_cfg["architecture"]
    if config.text.model is not None and _is_stored(config.text.model):
        found = cast(Any, text).config
        config.text.model = found.model_type
        ignored = ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype")
        config.text.args = {key: value for key, value in found.to_diff_dict().items() if key not in ignored}
    return config


def enable_activation_checkpointing(tower: Any, key: str) -> None:
    """Recompute the tower's activations in backward. Raises :class:`PairtileError` when it has no switch for that."""
    if hasattr(tower, "set_grad_checkpointing"):  # timm
        tower.set_grad_checkpointing(True)
    elif hasattr(tower, "gradient_checkpointing_enable"):  # transformers
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        raise PairtileError(
            f"train.activation_checkpointing: {key} is a {type(tower).__name__}, which has neither "
            "set_grad_checkpointing nor gradient_checkpointing_enable; turn the option off or add the method"
        )


def pool_hidden_states(hidden: Tensor, attention_mask: Tensor, pool: str) -> Tensor:
    """One vector per text: hidden [n, L, d], attention_mask bool [n, L] with the padding on the right -> [n, d]."""
    if hidden.dim() == 2:
        return hidden
    if pool == "first":
        return hidden[:, 0]
    if pool == "mean":
        weight = attention_mask.to(hidden.dtype).unsqueeze(-1)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    last = attention_mask.sum(1).clamp(min=1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def attention_implementation() -> str:
    """flash-attn where there is a CUDA device and the package, PyTorch's own fused attention elsewhere."""
    if torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    return "sdpa"


def _text_model(config: TextConfig, text_config: Any) -> nn.Module:
    from transformers import AutoModel, CLIPTextModel, SiglipTextModel

    special = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "siglip_text_model": SiglipTextModel}
    loader: Any = special.get(text_config.model_type, AutoModel)
    attention = attention_implementation() if config.attention == "auto" else config.attention
    if config.pretrained:
        return loader.from_pretrained(
            config.model, config=text_config, attn_implementation=attention, use_safetensors=True
        )
    build: Callable[..., nn.Module] = getattr(loader, "_from_config", None) or loader.from_config
    return build(text_config, attn_implementation=attention)


def _is_stored(model: str) -> bool:
    return "/" in model or Path(model).is_dir()


def _from_import_path(target: str, args: dict[str, Any], key: str) -> nn.Module:
    module_name, separator, name = target.partition(":")
    if not separator:
        raise PairtileError(f"{key}.target {target!r} is not of the form package.module:callable")
    try:
        module = getattr(importlib.import_module(module_name), name)(**args)
    except (ImportError, AttributeError, TypeError) as error:
        raise PairtileError(f"{key}.target {target!r} could not be built: {error}") from None
    if not isinstance(module, nn.Module):
        raise PairtileError(f"{key}.target {target!r} gave a {type(module).__name__}, expected an nn.Module")
    return module


def _refused(key: str, what: str, args: dict[str, Any], error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"{key}: {what} could not be built with {args}: {type(error).__name__}: {reason}"
