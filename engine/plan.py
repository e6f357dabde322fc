"""What can be known before training: does the recipe fit the data, the disk and the ranks, and what will it take."""

from __future__ import annotations

import os
import tempfile

import torch

from .data import (
    ShardDataset,
    Tokenizer,
    batches_per_epoch,
    build_image_transform,
    expand_shards,
    load_tokenizer,
)
from .errors import PairtileError, RecipeError
from .export import build_model
from .model import DualEncoder
from .objectives import check_objectives
from .recipe import Recipe
from .versions import dump_recipe


def check_batch(recipe: Recipe, world_size: int) -> None:
    """Raise :class:`RecipeError` unless every rank gets the same whole number of pairs."""
    size = recipe.train.batch_size
    if size % world_size:
        below = size - size % world_size
        nearest = " or ".join(str(near) for near in (below, below + world_size) if near)
        raise RecipeError(
            f"train.batch_size {size} is not divisible by the {world_size} ranks; take {nearest}, "
            "or start another number of ranks"
        )


def check_run_dir(recipe: Recipe) -> None:
    """Raise :class:`PairtileError` unless the run folder can be made and written to."""
    run_dir = recipe.run_dir
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise PairtileError(
            f"cannot write to the run folder {run_dir}: {error.strerror}; set output=FOLDER to one that you may write to"
        ) from None


def open_training_data(recipe: Recipe) -> tuple[ShardDataset, Tokenizer]:
    """The training split and the tokenizer. Raises :class:`PairtileError` when either is missing."""
    expand_shards(recipe.data.train, recipe.data.root)  # missing data is told before a missing tokenizer
    tokenizer = load_tokenizer(recipe.data.tokenizer or recipe.data.root)
    dataset = open_split(recipe, recipe.data.train, tokenizer, train=True)
    batches_per_epoch(dataset, recipe.train.batch_size)
    return dataset, tokenizer


def open_split(recipe: Recipe, shards: str | list[str], tokenizer: Tokenizer, *, train: bool) -> ShardDataset:
    """A split of the recipe's data, with augmentation if it is trained on."""
    config = recipe.data
    if not train and recipe.eval.captions is not None:
        config = config.model_copy(update={"captions": recipe.eval.captions})
    transform = build_image_transform(config, recipe.model.vision.image_size, train=train)
    return ShardDataset(shards, config=config, tokenizer=tokenizer, transform=transform, seed=recipe.train.seed)


def check_forward(model: DualEncoder, recipe: Recipe) -> None:
    """Send one blank pair through the towers, so that sizes which do not fit are told before training starts."""
    vision = recipe.model.vision
    clip = () if model.frames is None else (model.frames,)
    image = torch.zeros(1, *clip, vision.channels, vision.image_size, vision.image_size, dtype=torch.uint8)
    tokens = torch.zeros(1, recipe.data.context_length, dtype=torch.int64)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(image, tokens, torch.ones_like(tokens, dtype=torch.bool))
    except PairtileError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise PairtileError(
            f"a {vision.image_size} x {vision.image_size} image and {recipe.data.context_length} tokens do not pass through "
            f"the towers of model: {type(error).__name__}: {reason}"
        ) from None
    finally:
        model.train(training)


def refused_members(splits: dict[str, ShardDataset]) -> list[str]:
    """One line for each split with shards that hold what cannot be used: truncated tars, unsafe names and types."""
    lines = []
    for name, split in splits.items():
        if split.counts:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(split.counts.items()))
            first = "; ".join(member for member, _ in split.examples[:3])
            lines.append(f"{name}: left out when reading the shards: {reasons} (first: {first})")
    return lines


def total_steps(recipe: Recipe, samples: int) -> int:
    """Optimiser steps of the run."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert recipe.train.epochs is not None
    batches = samples // recipe.train.batch_size
    return max(1, int(recipe.train.epochs * batches / recipe.train.accumulation))


def describe_plan(recipe: Recipe, world_size: int) -> str:
    """The text of ``--dry-run``: the resolved recipe, the parameters and what each rank keeps in memory for them."""
    check_objectives(recipe.objectives)
    check_batch(recipe, world_size)
    dataset, tokenizer = open_training_data(recipe)
    config = recipe.model.model_copy(deep=True)
    config.vision.pretrained = config.text.pretrained = False  # sizes alone are wanted
    with torch.device("meta"):
        model = build_model(config, recipe.data, tokenizer)
    counts = {
        "vision tower": _count(model.vision, model.vision_projection, model.patch_projection),
        "text tower": _count(model.text, model.text_projection, model.word_projection),
    }
    total, trainable = _count(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = total_steps(recipe, len(dataset))
    local = recipe.train.batch_size // world_size
    chunks = "" if recipe.train.cache_chunk is None else f", {recipe.train.cache_chunk:,} at a time"
    # float32 throughout: parameters, gradients, and the two moments of AdamW; ZeRO divides them by the ranks in turn
    stage = recipe.train.zero_stage
    share = [1 if stage < least else world_size for least in (3, 2, 1)]
    memory = 4 * (total / share[0] + trainable / share[1] + 2 * trainable / share[2])
    lines = [
        dump_recipe(recipe).rstrip(),
        "---",
        f"training samples  {len(dataset):,}, {len(dataset) // recipe.train.batch_size:,} batches an epoch",
        f"steps             {steps:,} of {recipe.train.accumulation} x {recipe.train.batch_size:,} pairs, "
        f"{local:,} on each of {world_size} ranks{chunks}",
        f"vocabulary        {tokenizer.vocab_size:,} tokens, context {recipe.data.context_length}",
        *(f"{name:<17} {count:,} parameters" for name, count in counts.items()),
        f"parameters        {total:,}, {trainable:,} of them trained",
        f"memory per rank   {memory / 2**30:.2f} GiB for parameters, gradients and optimiser (ZeRO {stage}), "
        "activations not counted",
        f"threads           {os.cpu_count()} cores on this machine",
    ]
    return "\n".join(lines)


def _count(*modules: torch.nn.Module | None) -> int:
    return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())
