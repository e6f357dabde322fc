"""Token embeddings: the patches of an image tower and the words of a text tower, for late interaction."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import PairtileError


class Tokens(NamedTuple):
    """Embeddings of the tokens of n images or texts.

    Attributes:
        tokens: [n, L, dim], of unit length unless that was turned off. What stands where `mask` is False means nothing.
        mask: bool [n, L], True for tokens that count.
    """

    tokens: Tensor
    mask: Tensor


class FeatureMap(NamedTuple):
    """What a timm tower under :func:`return_feature_map` gives: its pooled features and what it pooled them of."""

    pooled: Tensor
    features: Tensor


def return_feature_map(tower: nn.Module) -> None:
    """Let a timm tower return :class:`FeatureMap` of one pass.

    Its parameters and their names stay as they are, and so does the call that goes through the module's hooks: ZeRO-3
    gathers the parameters that a tower owns itself, such as its positions, in them.
    """
    tower.forward = functools.partial(_both, tower)  # type: ignore[assignment]


def _both(tower: Any, images: Tensor) -> FeatureMap:
    features = tower.forward_features(images)
    return FeatureMap(tower.forward_head(features), features)


def patch_tokens(features: Tensor, tower: nn.Module, width: int, *, prefix_tokens: bool) -> Tensor:
    """The features of an image tower as a sequence [n, patches, width].

    Args:
        features: [n, L, width], or a map [n, width, H, W] or [n, H, W, width].
        tower: what made them: timm's ``num_prefix_tokens`` says how many class and register tokens come first, its
            ``output_fmt`` where a map has its channels.
        width: of the features.
        prefix_tokens: keep those.

    Raises:
        PairtileError: features of another shape, such as vectors that are pooled already.
    """
    if features.dim() == 3 and features.shape[2] == width:
        start = 0 if prefix_tokens else getattr(tower, "num_prefix_tokens", 0)
        return features[:, start:]
    if features.dim() == 4 and features.shape[1] == width and getattr(tower, "output_fmt", None) != "NHWC":
        return features.flatten(2).transpose(1, 2)
    if features.dim() == 4 and features.shape[3] == width:
        return features.flatten(1, 2)
    raise PairtileError(
        f"model.tokens: the image tower {type(tower).__name__} gives features of shape {list(features.shape)}; expected a "
        f"sequence [n, tokens, {width}] or a map [n, {width}, H, W], which is not pooled"
    )


def word_mask(input_ids: Tensor, attention_mask: Tensor, special_ids: Tensor) -> Tensor:
    """Which tokens of a text are words: bool [n, L].

    Args:
        input_ids: int64 [n, L].
        attention_mask: bool [n, L], False where padded.
        special_ids: int64 [s], tokens that are no words. A text that has no other keeps them: an empty set of tokens
            cannot be compared with anything.
    """
    words = attention_mask & ~torch.isin(input_ids, special_ids)
    return torch.where(words.any(1, keepdim=True), words, attention_mask)


def mean_of_tokens(embedded: Tokens, normalize: bool) -> Tensor:
    """The mean of the token embeddings that count [n, dim], normalised on request; zero where none does."""
    kept = torch.where(embedded.mask.unsqueeze(-1), embedded.tokens.float(), 0)
    mean = kept.sum(1) / embedded.mask.sum(1, keepdim=True).clamp(min=1)
    return F.normalize(mean, dim=-1) if normalize else mean
