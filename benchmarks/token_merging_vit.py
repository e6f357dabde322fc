"""The contenders of the end-to-end rows: one timm ViT-B/16 without merging, with ours, and with ToMe in plain PyTorch.

All of it at module level, because the memory runs take it to another process by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile.kernels import use_backend
from pairtile.kernels.token_merging import ConstantR, patch, tokens_per_layer, transformer_flops

from .harness import Call, Contender
from .peers import missing_backend
from .token_merging import tome

MODEL = "vit_base_patch16_224"
LAYERS, WIDTH, PATCH, CHANNELS, CLASSES = 12, 768, 16, 3, 1000
#: The contender whose images a second are the measure of the others.
UNMERGED = "without merging"


def inputs(batch: int, pixels: int, *, dtype: torch.dtype) -> list[Tensor]:
    """Images [batch, 3, pixels, pixels] of random pixels."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, CHANNELS, pixels, pixels, generator=generator).to(dtype)]


def flops(batch: int, pixels: int, r: int) -> float:
    """Of all matrix products of the model, its patch embedding and classifier among them."""
    patches = (pixels // PATCH) ** 2
    counts = token_counts(pixels, r)
    ends = 2 * WIDTH * (patches * CHANNELS * PATCH**2 + CLASSES)
    return batch * (transformer_flops(counts, WIDTH) + ends)


def token_counts(pixels: int, r: int) -> list[int]:
    """Tokens that enter each layer, and that leave the last."""
    tokens = (pixels // PATCH) ** 2 + 1
    return tokens_per_layer(ConstantR(r)(LAYERS, tokens, 1), tokens, 1)


def contenders(r: int) -> Sequence[Contender]:
    return [
        Contender("pairtile", partial(_ours, r), missing=missing_backend("cpp"), ours=True),
        Contender("eager ToMe", partial(_eager, r)),
        Contender(UNMERGED, _unmerged, comparable=False),
    ]


def _model(images: Tensor) -> Any:
    torch.manual_seed(0)
    return timm.create_model(MODEL, pretrained=False).eval().to(images.dtype)


def _unmerged(leaves: list[Tensor]) -> Call:
    return _call(_model(leaves[0]), leaves[0])


def _ours(r: int, leaves: list[Tensor]) -> Call:
    model = patch(_model(leaves[0]), r=r)

    def forward(images: Tensor) -> Tensor:
        with use_backend("cpp"):
            return model(images)  # type: ignore[no-any-return]

    return _call(forward, leaves[0])


def _eager(r: int, leaves: list[Tensor]) -> Call:
    return _call(partial(eager_tome, _model(leaves[0]), r), leaves[0])


def _call(model: Any, images: Tensor) -> Call:
    def call() -> list[Tensor]:
        with torch.no_grad():
            return [model(images)]

    return call


def eager_tome(model: Any, r: int, images: Tensor) -> Tensor:
    """ToMe (arXiv:2210.09461) around a timm model's own modules, as one writes it: a mask of log sizes, all cosines."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    size = torch.ones_like(x[..., :1])
    for block, (before, after) in zip(model.blocks, pairwise(token_counts(images.shape[-1], r)), strict=True):
        attended, metric = _attention(block.attn, block.norm1(x), size)
        x, size = tome(x + attended, metric, size, r=before - after)
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))  # type: ignore[no-any-return]


def _attention(attention: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Proportional attention, and the mean over heads of its keys."""
    batch, tokens, _ = x.shape
    q, k, v = attention.qkv(x).view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().transpose(1, 2).unsqueeze(1))
    return attention.proj(found.transpose(1, 2).reshape(x.shape)), k.mean(1)
