"""Named models, so that a recipe is one line: ``model: {preset: ViT-B-16}``.

ViT-B-16 and ViT-L-14 are open_clip's models of those names, parameter for parameter.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from .errors import RecipeError


def _clip_text(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    args = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }
    return {"model": "clip_text_model", "args": args, "pool": "last"}


def _open_clip_text(width: int, heads: int) -> dict[str, Any]:
    return _clip_text(width, 12, heads, hidden_act="gelu", vocab_size=49408, max_position_embeddings=77)


PRESETS: dict[str, dict[str, Any]] = {
    "vit-tiny-32px": {
        "vision": {
            "model": "vit_tiny_patch16_224",
            "args": {"img_size": 32, "patch_size": 4, "depth": 6, "class_token": False, "global_pool": "avg"},
            "image_size": 32,
        },
        "text": _clip_text(192, 2, 3),
        "embed_dim": 192,
    },
    "ViT-B-16": {
        "vision": {"model": "vit_base_patch16_clip_224"},
        "text": _open_clip_text(512, 8),
        "embed_dim": 512,
    },
    "ViT-L-14": {
        "vision": {"model": "vit_large_patch14_clip_224"},
        "text": _open_clip_text(768, 12),
        "embed_dim": 768,
    },
}


def expand_preset(model: Any) -> Any:
    """The ``model`` block of a recipe with its preset filled in; a block without preset is returned as it is."""
    if not isinstance(model, dict) or model.get("preset") is None:
        return model
    name = model["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"unknown model.preset {name!r}{hint} (known: {', '.join(PRESETS)})")
    return deep_merge(PRESETS[name], model)


def deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid on it, mapping by mapping; neither is changed."""
    merged = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = deep_merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
