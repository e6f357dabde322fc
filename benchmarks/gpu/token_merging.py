"""Contenders of the rows of token merging on a GPU: ours with and without csrc/cuda, and ToMe's formulation in PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from pairtile.kernels import token_merging, use_backend

from ..harness import Contender
from ..peers import missing_backend
from ..token_merging import Merging, forward_and_backward, tome
from .contenders import compiled, returned


def inputs(batch: int, tokens: int, width: int, metric_width: int, r: int, *, device: str) -> list[Tensor]:
    """x [batch, tokens, width] in bfloat16 with a gradient, metric in float32, sizes from 1 to 4, the gradient from above.

    Similarities in bfloat16 would have everybody choose other pairs.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    size = torch.randint(1, 5, (batch, tokens, 1), generator=generator, device=device).float()
    x, upstream = (draw(batch, count, width).bfloat16() for count in (tokens, tokens - r))
    return [x.requires_grad_(), draw(batch, tokens, metric_width), size, upstream]


def contenders(r: int) -> list[Contender]:
    plain = partial(_tome, r=r)
    return [
        _ours("pairtile triton", r, "triton"),
        _ours("pairtile triton, PAIRTILE_CUDA=0", r, "triton", cuda="0"),
        _ours("pairtile torch", r, "torch"),
        Contender("eager PyTorch", partial(forward_and_backward, partial(returned, plain))),
        Contender("torch.compile", partial(forward_and_backward, partial(compiled, plain)), compiled=True),
    ]


def _ours(name: str, r: int, backend: str, cuda: str = "1") -> Contender:
    prepare = partial(forward_and_backward, partial(_served, r, backend, cuda))
    return Contender(name, prepare, missing=missing_backend(backend), ours=True)


def _served(r: int, backend: str, cuda: str) -> Merging:
    def merging(x: Tensor, metric: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        with use_backend(backend), _environment("PAIRTILE_CUDA", cuda):
            merge, _ = token_merging.bipartite_soft_matching(metric, r, class_token=True)
            return token_merging.merge_wavg(merge, x, size)

    return merging


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _tome(x: Tensor, metric: Tensor, size: Tensor, *, r: int) -> tuple[Tensor, Tensor]:
    """Sums in float32, which is what the product with the sizes is."""
    merged, sizes = tome(x, metric, size, r=r)
    return merged.to(x.dtype), sizes
