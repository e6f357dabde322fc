"""The training engine: recipes, data, towers, the DeepSpeed trainer, evaluation and export.

``load(path)`` gives a trained model with ``encode_image`` and ``encode_text``, and with ``encode_image_tokens`` and
``encode_text_tokens`` where it was trained with token embeddings; ``pairtile.engine.train.train(recipe)``
trains one. ``GradientCache`` gives a training loop of your own contrastive batches larger than its memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import PairtileError
    from .export import Encoder, load
    from .gradient_cache import GradientCache
    from .recipe import Recipe, load_recipe

_HOME = {
    "Encoder": "export",
    "GradientCache": "gradient_cache",
    "PairtileError": "errors",
    "Recipe": "recipe",
    "load": "export",
    "load_recipe": "recipe",
}
__all__ = ["Encoder", "GradientCache", "PairtileError", "Recipe", "load", "load_recipe"]


def __getattr__(name: str) -> Any:
    # lazily, so that reading a recipe does not wait for DeepSpeed, nor embedding for the trainer
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
