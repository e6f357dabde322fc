"""Objectives: the terms of a recipe's loss, by name.

An objective is called with the model's output and the batch and returns a scalar that follows the convention of
the losses: the global value on every rank, and a gradient whose mean over ranks is the gradient of that value.
To add one, write a class (or function) that takes ``args`` and the process group, and register it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import ClipLoss, FilipLoss, SigLipLoss
from ..kernels.distributed import gather_counts, global_mean
from ..kernels.token_merging import cross_token_divergence
from .data import Batch
from .errors import RecipeError
from .loss_objectives import LOSS_OBJECTIVES, LossObjective, dtype_on_wire
from .model import DualOutput
from .recipe import ObjectiveConfig


class Objective(Protocol):
    def __call__(self, output: DualOutput, batch: Batch) -> Tensor: ...


OBJECTIVES: dict[str, Callable[..., Objective]] = dict(LOSS_OBJECTIVES)


def register(name: str) -> Callable[[Callable[..., Objective]], Callable[..., Objective]]:
    """Make an objective known to recipes under ``name``."""

    def keep(factory: Callable[..., Objective]) -> Callable[..., Objective]:
        OBJECTIVES[name] = factory
        return factory

    return keep


@register("clip")
class Clip:
    """Symmetric InfoNCE over the global batch (CLIP, Radford et al. 2021).

    ``label_smoothing`` as in ALIGN (0.1); ``direction_weights`` are those of image to text and text to image. How ranks
    share their features: ``strategy: ring`` (or gather), ``scope: node``, ``wire_dtype: bfloat16``, ``node_size``; see
    docs/large_batches.md. All objectives with a loss over the batch take these four.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None,
        strategy: str = "gather",
        label_smoothing: float = 0.0,
        direction_weights: tuple[float, float] = (0.5, 0.5),
        scope: str = "global",
        wire_dtype: str | None = None,
        node_size: int | None = None,
    ) -> None:
        self.loss = ClipLoss(
            group=group,
            strategy=strategy,
            label_smoothing=label_smoothing,
            direction_weights=direction_weights,
            scope=scope,
            wire_dtype=dtype_on_wire(wire_dtype),
            node_size=node_size,
        )

    def __call__(self, output: DualOutput, batch: Batch) -> Tensor:
        return self.loss(output.image_features, output.text_features, output.logit_scale)


@register("siglip")
class SigLip:
    """Pairwise sigmoid loss over the global batch (SigLIP, Zhai et al. 2023). Wants ``model.init_logit_bias: -10``."""

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None,
        strategy: str = "gather",
        scope: str = "global",
        wire_dtype: str | None = None,
        node_size: int | None = None,
    ) -> None:
        wire = dtype_on_wire(wire_dtype)
        self.loss = SigLipLoss(group=group, strategy=strategy, scope=scope, wire_dtype=wire, node_size=node_size)

    def __call__(self, output: DualOutput, batch: Batch) -> Tensor:
        if output.logit_bias is None:
            raise RecipeError("objective siglip needs a bias: set model.init_logit_bias (the paper starts at -10)")
        return self.loss(output.image_features, output.text_features, output.logit_scale, output.logit_bias)


@register("filip")
class Filip:
    """Cross-entropy of token-wise maximum similarities over the global batch (FILIP, arXiv:2111.07783).

    Wants ``model.tokens``. ``direction_weights`` as in ``clip``; ``travelling`` and ``select_tokens`` (the paper's 0.25 of
    each set's tokens) as in :class:`pairtile.kernels.FilipLoss`. ``token_dtype: bfloat16`` rounds the unit vectors before
    they are multiplied, as the paper halves their precision; sums and the loss stay float32.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None,
        direction_weights: tuple[float, float] = (0.5, 0.5),
        travelling: str = "text",
        select_tokens: float | None = None,
        token_dtype: str = "float32",
        strategy: str = "gather",
        scope: str = "global",
        wire_dtype: str | None = None,
        node_size: int | None = None,
    ) -> None:
        if token_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"token_dtype={token_dtype!r}: expected float32 or bfloat16")
        self.loss = FilipLoss(
            group=group,
            direction_weights=direction_weights,
            travelling=travelling,
            select_tokens=select_tokens,
            strategy=strategy,
            scope=scope,
            wire_dtype=dtype_on_wire(wire_dtype),
            node_size=node_size,
        )
        self.dtype: torch.dtype = getattr(torch, token_dtype)

    def __call__(self, output: DualOutput, batch: Batch) -> Tensor:
        if output.image_tokens is None or output.text_tokens is None:
            raise RecipeError("objective filip needs token embeddings: set model.tokens.dim (the paper has 256)")
        tokens = output.image_tokens.to(self.dtype), output.text_tokens.to(self.dtype)
        loss: Tensor = self.loss(*tokens, output.logit_scale, text_mask=output.text_mask)
        return loss


@register("crossget")
class CrossGet:
    """Jensen-Shannon divergence of both towers' cross tokens, layer by layer (CrossGET, arXiv:2305.17455).

    Wants ``token_merging: {method: crossget, cross_tokens: true}`` in both towers, of as many layers each. It goes beside
    ``clip``; mean over layers and the global batch.
    """

    def __init__(self, *, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __call__(self, output: DualOutput, batch: Batch) -> Tensor:
        one, other = output.image_cross, output.text_cross
        if one is None or other is None or one.shape != other.shape:
            raise RecipeError(
                "objective crossget needs the cross tokens of two towers with one number of layers, and model.embed_dim: "
                "set token_merging={method: crossget, cross_tokens: true, keep_ratio: 0.8} of model.vision and model.text"
            )
        terms = cross_token_divergence(one, other).mean(1)
        return global_mean(terms, gather_counts(len(terms), device=terms.device, group=self.group))


class WeightedSum:
    """The recipe's loss: the sum of its terms. :meth:`terms` gives them apart, for logging."""

    def __init__(self, configs: list[ObjectiveConfig], group: dist.ProcessGroup | None) -> None:
        self._terms = [(config.name, config.weight, _build(config, group)) for config in configs]

    def terms(self, output: DualOutput, batch: Batch) -> dict[str, Tensor]:
        return {name: weight * objective(output, batch) for name, weight, objective in self._terms}


def _build(config: ObjectiveConfig, group: dist.ProcessGroup | None) -> Objective:
    if config.name not in OBJECTIVES:
        near = difflib.get_close_matches(config.name, OBJECTIVES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"unknown objective {config.name!r}{hint} (known: {', '.join(sorted(OBJECTIVES))})")
    factory = OBJECTIVES[config.name]
    if isinstance(factory, LossObjective):
        known = factory.arguments()
    else:
        known = [name for name in inspect.signature(factory).parameters if name != "group"]
    for key in config.args:
        if key not in known:
            raise RecipeError(f"objective {config.name} has no argument {key!r} (its arguments: {', '.join(known)})")
    try:
        return factory(group=group, **config.args)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"objective {config.name}: {error}") from None


def check_objectives(configs: list[ObjectiveConfig]) -> None:
    """Build and drop the objectives, so that a wrong name or argument is told before anything is loaded."""
    for config in configs:
        _build(config, None)


__all__: list[Any] = ["OBJECTIVES", "Objective", "WeightedSum", "check_objectives", "register"]
