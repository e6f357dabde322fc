"""Inputs made on the device, and who computes what: ours, plain PyTorch, and the peers by their documented interfaces.

A contender's call returns one entry for each of the row's results, None for a gradient that it does not compute.
Peers are imported when they are prepared: one that cannot be imported is left out with its error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile import kernels
from pairtile.kernels import Diagonal, LogSumExp, PairScore, similarity_reduce, use_backend

from ..harness import Call, Contender, Prepare
from ..peers import missing_backend, missing_peer

Loss = Callable[..., Tensor]
#: How a loss is called: `training_step` or `forward_alone`.
Step = Callable[[Callable[[], Loss], list[Tensor]], Call]

#: Cosine of a pair, as in the CPU suite.
_PAIR_COSINE = 0.15


def clip_inputs(
    batch: int, width: int, *, device: str, dtype: torch.dtype = torch.bfloat16, scale: float = 14.3
) -> list[Tensor]:
    """Image features, text features [batch, width], normalised, and the scale (float32, shape [])."""
    generator = torch.Generator(device).manual_seed(0)
    images, other = (
        F.normalize(torch.randn(batch, width, generator=generator, device=device), dim=-1) for _ in range(2)
    )
    texts = F.normalize(_PAIR_COSINE * images + (1 - _PAIR_COSINE**2) ** 0.5 * other, dim=-1)
    factor = torch.tensor(scale, device=device)
    return [images.to(dtype).requires_grad_(), texts.to(dtype).requires_grad_(), factor.requires_grad_()]


def siglip_inputs(batch: int, width: int, *, device: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """As for CLIP, and a bias of shape []: the initial values of SigLIP, arXiv:2303.15343."""
    bias = torch.tensor(-10.0, device=device)
    return [*clip_inputs(batch, width, device=device, dtype=dtype, scale=10.0), bias.requires_grad_()]


def language_model_inputs(
    tokens: int, vocabulary: int, width: int, *, device: str, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """Hidden states [tokens, width], vocabulary matrix [vocabulary, width], targets [tokens]; logits of variance 1."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    matrix = (torch.randn(vocabulary, width, generator=generator, device=device) / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    return [hidden.requires_grad_(), matrix.requires_grad_(), targets]


def training_step(make_loss: Callable[[], Loss], leaves: list[Tensor]) -> Call:
    """A loss's value, then the gradient of each leaf that requires one, None where the loss gives none."""
    loss = make_loss()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def call() -> list[Any]:
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, wanted, allow_unused=True)]

    return call


def on_device_of(make_loss: Callable[[], Loss], leaves: list[Tensor]) -> Call:
    """A training step of a formula that makes its masks on the default device."""
    call = training_step(make_loss, leaves)

    def there() -> list[Tensor]:
        with torch.device(leaves[0].device):
            return call()

    return there


def mixed_clip(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """One product in the features' dtype, the softmax in float32, as under autocast."""
    logits = scale * (images @ texts.T).float()
    labels = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def mixed_siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """softplus(-s) = softplus(s) - s on the diagonal: no matrix of labels."""
    logits = scale * (images @ texts.T).float() + bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(images)


def linear_then_cross_entropy(hidden: Tensor, vocabulary: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, vocabulary).float(), targets)


def returned(loss: Loss) -> Loss:
    return loss


def compiled(loss: Loss) -> Loss:
    return torch.compile(loss, fullgraph=True, dynamic=False)


def plain(loss: Loss, step: Step = training_step) -> list[Contender]:
    """The formula in PyTorch, eager and compiled."""
    return [
        Contender("eager PyTorch", partial(step, partial(returned, loss))),
        Contender("torch.compile", partial(step, partial(compiled, loss)), compiled=True),
    ]


def pairtile_loss(name: str, backend: str) -> Loss:
    """Our loss class, made, or our function of that name, served by one backend."""
    found = getattr(kernels, name)
    function = found() if isinstance(found, type) else found

    def served(*leaves: Tensor) -> Tensor:
        with use_backend(backend):
            return function(*leaves)

    return served


def pairtile_clip(precision: str) -> Loss:
    """CLIP's loss on the operator, which lets the caller say how float32 is multiplied."""
    asked = (LogSumExp(exclude=Diagonal()), PairScore())

    def loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        with use_backend("triton"):
            (others, own), (others_t, own_t) = similarity_reduce(
                images, texts, scale=scale, rows=asked, cols=asked, precision=precision
            )
        return (F.softplus(others - own) + F.softplus(others_t - own_t)).mean() / 2

    return loss


def ours(name: str, step: Step = training_step) -> list[Contender]:
    """Our own two: the first one that can run is what the others are compared with."""
    return [
        Contender(
            f"pairtile {backend}",
            partial(step, partial(pairtile_loss, name, backend)),
            missing=missing_backend(backend),
            ours=True,
        )
        for backend in ("triton", "torch")
    ]


def ours_at(precision: str) -> Contender:
    prepare = partial(training_step, partial(pairtile_clip, precision))
    return Contender("pairtile triton", prepare, missing=missing_backend("triton"), ours=True)


def open_clip(name: str, step: Step = training_step) -> Contender:
    """open_clip's class, made as its own training script makes it on one process."""

    def make() -> Loss:
        return getattr(import_module("open_clip.loss"), name)(cache_labels=True)

    return _peer("open_clip", partial(step, make))


def memeff(step: Step = training_step) -> Contender:
    """The temperature is a number there, without a gradient; stable=True would rescale the gradients."""

    def prepare(leaves: list[Tensor]) -> Call:
        make = import_module("memeff").MemoryEfficientCLIPLoss
        loss = make(temperature=1 / leaves[2].item(), normalized_inputs=True, stable=False)
        return step(lambda: lambda images, texts, scale: loss(images, texts), leaves)

    return _peer("memeff", prepare)


def inf_cl(step: Step = training_step) -> Contender:
    """One direction at a time; it multiplies in TF32, whatever the features' dtype."""

    def make() -> Loss:
        terms = import_module("inf_cl").cal_flash_loss
        return lambda x, y, scale: (terms(x, y, scale=scale).mean() + terms(y, x, scale=scale).mean()) / 2

    return _peer("inf-cl", partial(step, make))


def siglip_kernel() -> Contender:
    """It takes the scale's logarithm."""

    def make() -> Loss:
        loss = import_module("siglip_kernel").fused_siglip_loss
        return lambda images, texts, scale, bias: loss(images, texts, scale.log(), bias)

    return _peer("siglip-kernel", partial(training_step, make))


def cut_cross_entropy() -> list[Contender]:
    """As it comes it leaves out blocks whose probabilities are below what bfloat16 would see; and with all of them."""

    def make(**options: Any) -> Loss:
        return partial(import_module("cut_cross_entropy").linear_cross_entropy, **options)

    exact = partial(training_step, partial(make, filter_eps=None))
    return [
        _peer("cut-cross-entropy", partial(training_step, make)),
        _peer("cut-cross-entropy", exact, name="cut-cross-entropy (no filter)"),
    ]


def liger_kernel() -> Contender:
    def make() -> Loss:
        found = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        loss = found.LigerFusedLinearCrossEntropyLoss()
        return lambda hidden, vocabulary, targets: loss(vocabulary, hidden, targets)

    return _peer("liger-kernel", partial(training_step, make))


def _peer(library: str, prepare: Prepare, name: str | None = None) -> Contender:
    return Contender(name or library, prepare, missing=missing_peer(library))
