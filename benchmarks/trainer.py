"""Contenders of the trainer's rows: one optimiser step of our loop and one of open_clip's, on the same model and batch.

Ours is the turn of the loop in `engine/train.py`, guards and all, under DeepSpeed with ZeRO 0. Theirs is `train_one_epoch` of
`open_clip_train`, as pip installs it, on an epoch of one batch, with AdamW made as its `main.py` does. The model is ours: towers of
timm and transformers that know neither trainer.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pairtile.engine.data import Batch
from pairtile.engine.guard import GradientGuard
from pairtile.engine.incidents import non_finite
from pairtile.engine.model import DualEncoder
from pairtile.engine.objectives import WeightedSum
from pairtile.engine.passes import Passes
from pairtile.engine.recipe import Recipe, parse_recipe
from pairtile.engine.runtime import seed_step, start
from pairtile.engine.train import initialize

from .harness import Call, Contender
from .peers import missing_backend, missing_peer
from .work import Work

VOCABULARY, LENGTH = 1000, 16
#: As open_clip names them.
PRECISIONS = {"fp32": "fp32", "bf16": "amp_bf16"}


def recipe(batch: int, precision: str) -> Recipe:
    """A ViT of 6 layers on 64 pixels and a text transformer of 4, both 192 wide."""
    vision = {"model": "vit_tiny_patch16_224", "args": {"img_size": 64, "patch_size": 8, "depth": 6}, "image_size": 64}
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    return parse_recipe(
        {
            "name": "benchmark",
            "data": {"root": ".", "context_length": LENGTH},
            "model": {"vision": vision, "text": {"model": "clip_text_model", "args": sizes}, "embed_dim": 256},
            "train": {"batch_size": batch, "steps": 1, "lr": 1e-4, "precision": precision},
        }
    )


def inputs(batch: int) -> list[Tensor]:
    """Pixels, token ids and their mask."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(1, VOCABULARY, (batch, LENGTH), generator=generator)
    return [images, input_ids, torch.ones_like(input_ids, dtype=torch.bool)]


def work(batch: int, dtype: torch.dtype) -> Work:
    """Three times the products of the towers' forward, as torch counts them; each parameter read and written once."""
    model = _model(recipe(batch, "fp32"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs(2))
    parameters = sum(each.numel() for each in model.parameters())
    return Work(3 * counter.get_total_flops() * batch / 2, 8.0 * parameters, dtype, "3 forwards of the towers")


def contenders(precision: str) -> list[Contender]:
    return [
        Contender("pairtile", partial(our_step, precision), missing=missing_backend("cpp"), ours=True),
        Contender("open_clip", partial(open_clip_step, precision), missing=missing_peer("open_clip")),
    ]


def _model(config: Recipe) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(config.model, vocab_size=VOCABULARY, pad_id=0, context_length=LENGTH)


def our_step(precision: str, leaves: list[Tensor]) -> Call:
    """Its loss; the next call takes the next step on the same batch."""
    config = recipe(len(leaves[0]), precision)
    runtime = start(torch.get_num_threads())
    os.environ.pop("MASTER_PORT", None)  # the memory run, a child of this process, needs a port of its own
    model = _model(config).train()
    guard, objective = GradientGuard(model), WeightedSum(config.objectives, runtime.group)
    passes = Passes.of(initialize(model, config, runtime, universal=False), config.train, runtime)
    batch = _batch(leaves)

    def call() -> list[Tensor]:
        seed_step(config.train.seed, runtime.rank, 0)
        output = passes.forward(batch)
        loss = torch.stack(list(objective.terms(output, batch).values())).sum()
        assert not any(flag for flags in runtime.gather_flags(*non_finite(output, loss)) for flag in flags)
        passes.backward(loss)
        assert not any(flag for flags in runtime.gather_flags(guard.take()) for flag in flags)
        passes.step()
        return [loss.detach()]

    return call


def _batch(leaves: list[Tensor]) -> Batch:
    images, input_ids, mask = leaves
    index, names = torch.arange(len(images)), [str(number) for number in range(len(images))]
    return Batch(images, input_ids, mask, index, index, names, names, 0, 0, [])


class _AsOpenClip(nn.Module):
    """Our model as open_clip's loop calls its own."""

    def __init__(self, model: DualEncoder, mask: Tensor) -> None:
        super().__init__()
        self.model, self.mask = model, mask
        self.logit_scale = model.logit_scale  # the loop clamps it by this name

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        output = self.model(images, texts, self.mask)
        return {
            "image_features": output.image_features,
            "text_features": output.text_features,
            "logit_scale": output.logit_scale,
        }


class _Remembering(nn.Module):
    """A loss whose last value can be asked for, which the loop keeps to itself."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss, self.last = loss, torch.tensor(0.0)

    def forward(self, *given: Tensor, **named: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.loss(*given, **named)
        self.last = losses["contrastive_loss"].detach()
        return losses


class _OneBatch:
    """What open_clip's loop asks of its data: an epoch of one batch."""

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        self.dataloader, self._batch = self, (images, texts)
        self.num_batches, self.num_samples = 1, len(images)

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([self._batch])


def open_clip_step(precision: str, leaves: list[Tensor]) -> Call:
    """Its loss, as `our_step`."""
    import open_clip
    from open_clip_train.train import train_one_epoch

    images, texts, mask = leaves
    config = recipe(len(images), precision)
    model = _AsOpenClip(_model(config), mask)
    loss = _Remembering(open_clip.loss.ClipLoss())
    named = list(model.named_parameters())
    decayed = [each for _, each in named if each.ndim > 1]
    others = [each for _, each in named if each.ndim <= 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": config.train.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=config.train.lr, betas=config.train.betas, eps=config.train.eps)
    settings = Namespace(
        device="cpu", precision=PRECISIONS[precision], accum_freq=1, skip_scheduler=True, distill=False, horovod=False,
        grad_clip_norm=config.train.grad_clip, log_every_n_steps=1, batch_size=len(images), rank=0, local_rank=0,
        world_size=1, wandb=False,
    )  # fmt: skip
    data = {"train": _OneBatch(images, texts)}
    logging.getLogger().setLevel(logging.WARNING)  # it logs each step

    def call() -> list[Tensor]:
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, settings)
        return [loss.last]

    return call
