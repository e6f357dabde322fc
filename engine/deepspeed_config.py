"""The DeepSpeed configuration of a recipe."""

from __future__ import annotations

from typing import Any

import torch

from .errors import RecipeError
from .presets import deep_merge
from .recipe import Recipe

_OWNED = {
    "train_batch_size": "set train.batch_size",
    "train_micro_batch_size_per_gpu": "set train.batch_size",
    "gradient_accumulation_steps": "set train.accumulation",
    "gradient_clipping": "set train.grad_clip",
    "zero_optimization.stage": "set train.zero_stage",
    "bf16": "set train.precision, which keeps the logit scale in float32",
    "fp16": "set train.precision",
    "torch_autocast.enabled": "set train.precision",
    "optimizer": "set train.lr, train.betas, train.weight_decay",
    "scheduler": "set train.schedule and train.warmup_steps",
}
_BUCKET = 2**25  # elements; DeepSpeed allocates its buckets whole, and its default of 5e8 would be 2 GB


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """What ``train`` says, in DeepSpeed's words, with the recipe's ``deepspeed:`` block laid over it as it is."""
    train = recipe.train
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "overlap_comm": torch.cuda.is_available() and train.zero_stage > 0,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }
    if train.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": _BUCKET}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.batch_size // world_size,
        "gradient_accumulation_steps": train.accumulation if train.cache_chunk is None else 1,
        "gradient_clipping": train.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloading works with any optimiser
        "steps_per_print": 10**9,  # progress.py prints
        "wall_clock_breakdown": False,
    }
    if train.precision == "bf16":
        # float32 parameters and bf16 products: DeepSpeed's own bf16 mode would round logit_scale itself to bf16,
        # where 100 becomes 98.9 and a step is 3%.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return deep_merge(config, _checked(recipe.deepspeed))


def _checked(block: dict[str, Any]) -> dict[str, Any]:
    """The recipe's own block, with numbers that YAML reads as strings (5e8) made numbers.

    Raises:
        RecipeError: a key that ``train`` owns: DeepSpeed would act on it and the trainer would not know.
    """
    for key, instead in _OWNED.items():
        node: Any = block
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            raise RecipeError(f"deepspeed.{key} is set by the trainer: {instead}")
    return {key: _number(value) for key, value in block.items()}


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _number(entry) for key, entry in value.items()}
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else number
    return value
