"""The contenders of the contrastive suite: inputs, our losses, peers, and the dense formulas.

All of it at module level, because the memory runs take it to another process by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile import kernels
from pairtile.kernels import use_backend
from pairtile.kernels.backends import select_backend

from .harness import Contender, forward_and_backward
from .peers import missing_backend, missing_compiler, missing_kernel, missing_peer

#: Cosine of a pair. Random pairs have 0; with this one the loss at scale 100 is about that of a trained CLIP model,
#: where the dense formula still has digits to agree with.
_PAIR_COSINE = 0.15


def clip_inputs(batch: int, width: int, *, dtype: torch.dtype = torch.float32, scale: float = 14.3) -> list[Tensor]:
    """Image features, text features [batch, width], normalised, and the scale (float32, shape [])."""
    generator = torch.Generator().manual_seed(0)
    images, other = (F.normalize(torch.randn(batch, width, generator=generator), dim=-1) for _ in range(2))
    texts = F.normalize(_PAIR_COSINE * images + (1 - _PAIR_COSINE**2) ** 0.5 * other, dim=-1)
    return [images.to(dtype).requires_grad_(), texts.to(dtype).requires_grad_(), torch.tensor(scale).requires_grad_()]


def siglip_inputs(batch: int, width: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """As for CLIP, and a bias of shape []: the initial values of SigLIP, arXiv:2303.15343."""
    return [*clip_inputs(batch, width, dtype=dtype, scale=10.0), torch.tensor(-10.0).requires_grad_()]


def language_model_inputs(tokens: int, vocabulary: int, width: int) -> list[Tensor]:
    """Hidden states [tokens, width], vocabulary matrix [vocabulary, width], targets [tokens]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    matrix = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return [hidden.requires_grad_(), matrix.requires_grad_(), targets]


def one_product_clip(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss as one writes it by hand: the logits once, their transpose for the other direction."""
    logits = scale * images @ texts.T
    labels = torch.arange(len(images))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def mixed_clip(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """A 16-bit product and a float32 softmax, as autocast has it."""
    logits = scale * (images @ texts.T).float()
    labels = torch.arange(len(images))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def exact_clip(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """softplus(LSE over the others - own), which float64 needs too: the usual form cancels on aligned pairs."""
    logits = scale * images @ texts.T
    own = logits.diagonal()
    others = logits.masked_fill(torch.eye(len(images), dtype=torch.bool), float("-inf"))
    return -(F.logsigmoid(own - others.logsumexp(1)) + F.logsigmoid(own - others.logsumexp(0))).mean() / 2


def lean_siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP without a matrix of labels: softplus(-s) = softplus(s) - s on the diagonal."""
    logits = scale * images @ texts.T + bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(images)


def exact_siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / len(images)


def linear_then_cross_entropy(hidden: Tensor, vocabulary: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, vocabulary), targets)


def eager(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def pairtile_function(name: str, backend: str) -> Callable[..., Tensor]:
    """Our loss class, made, or our function of that name, served by one backend."""
    found = getattr(kernels, name)
    function = found() if isinstance(found, type) else found
    if select_backend(torch.device("cpu"))[0] == backend:
        return function

    def served(*leaves: Tensor) -> Tensor:
        with use_backend(backend):
            return function(*leaves)

    return served


def open_clip_loss(name: str) -> Callable[..., Tensor]:
    """open_clip's class, made as its own training script makes it on one process."""
    return getattr(import_module("open_clip.loss"), name)(cache_labels=True)


def ours(name: str, *backends: str) -> list[Contender]:
    """Our own contenders: the first one that can run is the one that bars speak of."""
    return [
        Contender(
            name=f"pairtile {backend}",
            prepare=partial(forward_and_backward, partial(pairtile_function, name, backend)),
            missing=missing_kernel(name) or missing_backend(backend),
            ours=True,
        )
        for backend in backends
    ]


def open_clip(name: str) -> Contender:
    return Contender(
        name="open_clip",
        prepare=partial(forward_and_backward, partial(open_clip_loss, name)),
        missing=missing_peer("open_clip"),
    )


def plain(name: str, function: Callable[..., Tensor]) -> list[Contender]:
    """A formula in plain PyTorch: eager, and the same compiled."""
    return [
        Contender(name, partial(forward_and_backward, partial(eager, function))),
        Contender(
            name=f"{name} (compiled)",
            prepare=partial(forward_and_backward, partial(compiled, function)),
            missing=missing_compiler(),
            compiled=True,
        ),
    ]
