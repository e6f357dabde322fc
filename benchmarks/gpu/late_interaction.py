"""Contenders of the rows of late interaction on a GPU: ours, plain PyTorch, flash-maxsim and late-interaction-kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile import kernels
from pairtile.kernels import use_backend

from ..harness import Contender, forward_alone
from ..late_interaction import dense_maxsim
from ..peers import missing_backend, missing_peer
from .contenders import Loss, Step, plain, training_step

#: q [Nq, Lq, D] and d [Nd, Ld, D] -> [Nq, Nd].
Scores = Callable[[Tensor, Tensor], Tensor]
_SCALE = 14.3


def maxsim_inputs(
    queries: int,
    query_tokens: int,
    documents: int,
    document_tokens: int,
    width: int,
    *,
    device: str,
    gradients: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Queries and documents, unit vectors; a quarter of a query's tokens have a cosine of 0.7 with its own document."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (queries, query_tokens, width), (documents, document_tokens, width)
    q, d = (F.normalize(torch.randn(*shape, generator=generator, device=device), dim=-1) for shape in shapes)
    pairs, near = min(queries, documents), max(1, min(query_tokens, document_tokens) // 4)
    q[:pairs, :near] = F.normalize(q[:pairs, :near] + d[:pairs, :near], dim=-1)
    return [each.to(dtype).requires_grad_(gradients) for each in (q, d)]


def own_document(scores: Tensor) -> Tensor:
    """ColBERT's cross-entropy in the batch."""
    return F.cross_entropy(scores.float(), torch.arange(len(scores), device=scores.device))


def filip(scores: Scores, images: Tensor, texts: Tensor) -> Tensor:
    """FILIP's loss of one direction's scores at a time, for who has no more (arXiv:2111.07783)."""
    of_images = scores(images, texts) / images.shape[1]
    of_texts = scores(texts, images) / texts.shape[1]
    return (own_document(_SCALE * of_images) + own_document(_SCALE * of_texts)) / 2


def colbert_step(scores: Scores) -> Loss:
    return lambda q, d: own_document(scores(q, d))


def filip_step(scores: Scores) -> Loss:
    return partial(filip, scores)


def dense_colbert(q: Tensor, d: Tensor) -> Tensor:
    return own_document(dense_maxsim(q, d))


def dense_filip(images: Tensor, texts: Tensor) -> Tensor:
    """Both directions of one product."""
    products = torch.einsum("npd,mrd->nmpr", images, texts)
    of_images, of_texts = products.amax(-1).float().mean(-1), products.amax(-2).float().mean(-1)
    return (own_document(_SCALE * of_images) + own_document(_SCALE * of_texts.T)) / 2


def our_filip(images: Tensor, texts: Tensor) -> Tensor:
    loss: Tensor = kernels.FilipLoss()(images, texts, _SCALE)
    return loss


def ours(function: Callable[..., Tensor], step: Step) -> list[Contender]:
    """By each of our backends; the first one that can run is what the others are compared with."""

    def served(backend: str) -> Loss:
        def call(*leaves: Tensor) -> Tensor:
            with use_backend(backend):
                return function(*leaves)

        return call

    return [
        Contender(
            f"pairtile {backend}",
            partial(step, partial(served, backend)),
            missing=missing_backend(backend),
            ours=True,
        )
        for backend in ("triton", "torch")
    ]


def peers(wrap: Callable[[Scores], Callable[..., Tensor]], step: Step) -> list[Contender]:
    """Both libraries, their scores inside of `wrap`: as they come, or in a loss."""
    train = step is training_step
    made = (("flash-maxsim", partial(_flash, train)), ("late-interaction-kernels", _lik))
    return [
        Contender(name, partial(step, partial(_wrapped, wrap, scores)), missing=missing_peer(name))
        for name, scores in made
    ]


def _wrapped(wrap: Callable[[Scores], Callable[..., Tensor]], scores: Callable[[], Scores]) -> Callable[..., Tensor]:
    return wrap(scores())


def _flash(train: bool) -> Scores:
    """It multiplies in float16, whatever the tokens' dtype."""
    found: Scores = getattr(import_module("flash_maxsim"), "flash_maxsim_batched" + ("_train" if train else ""))
    return found


def _lik() -> Scores:
    found: Scores = import_module("late_interaction_kernels").maxsim
    return found


def scoring() -> list[Contender]:
    return [
        *ours(kernels.maxsim, forward_alone),
        *peers(lambda scores: scores, forward_alone),
        *plain(dense_maxsim, forward_alone),
    ]


def colbert() -> list[Contender]:
    return [
        *ours(colbert_step(kernels.maxsim), training_step),
        *peers(colbert_step, training_step),
        *plain(dense_colbert),
    ]


def filip_loss() -> list[Contender]:
    return [
        *ours(our_filip, training_step),
        *peers(filip_step, training_step),
        *plain(dense_filip),
    ]
