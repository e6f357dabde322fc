"""The DeepSpeed configuration of a recipe."""

from __future__ import annotations

from typing import Any

import torch

from .presets import deep_merge
from .recipe import Recipe

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
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # progress.py prints
        "wall_clock_breakdown": False,
    }
    if train.precision == "bf16":
        # float32 parameters and bf16 products: DeepSpeed's own bf16 mode would round logit_scale itself to bf16,
        # where 100 becomes 98.9 and a step is 3%.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return deep_merge(config, recipe.deepspeed)
