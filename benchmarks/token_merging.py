"""The contenders of the token-merging suite: inputs, ours, and ToMe's and PiToMe's formulations in PyTorch.

All of it at module level, because the memory runs take it to another process by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile.kernels import token_merging, use_backend

from .contrastive import compiled, eager
from .harness import Call, Contender
from .peers import missing_backend, missing_compiler

#: (x, metric, size) -> (merged tokens, their sizes).
Merging = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
#: How it is called: `forward` or `forward_and_backward`.
Step = Callable[[Callable[[], Merging], list[Tensor]], Call]

#: PiToMe's, of a layer in the middle.
MARGIN = 0.45


def inputs(batch: int, tokens: int, width: int, metric_width: int, r: int) -> list[Tensor]:
    """x [batch, tokens, width] with a gradient, metric, sizes from 1 to 4, and the gradient that comes from above."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, width, generator=generator).requires_grad_()
    metric = torch.randn(batch, tokens, metric_width, generator=generator)
    size = torch.randint(1, 5, (batch, tokens, 1), generator=generator).to(x.dtype)
    return [x, metric, size, torch.randn(batch, tokens - r, width, generator=generator)]


def forward(make: Callable[[], Merging], leaves: list[Tensor]) -> Call:
    merging = make()
    x, metric, size, _ = leaves

    def call() -> list[Tensor]:
        with torch.no_grad():
            return list(merging(x, metric, size))

    return call


def forward_and_backward(make: Callable[[], Merging], leaves: list[Tensor]) -> Call:
    merging = make()
    x, metric, size, upstream = leaves

    def call() -> list[Tensor]:
        merged, sizes = merging(x, metric, size)
        return [merged.detach(), sizes, *torch.autograd.grad(merged, x, upstream)]

    return call


def contenders(name: str, r: int, step: Step) -> Sequence[Contender]:
    """Ours by each backend of the CPU, then the formulation in PyTorch; `name` is "tome" or "pitome"."""
    ours = [
        Contender(
            f"pairtile {backend}",
            partial(step, partial(_ours, name, r, backend)),
            missing=missing_backend(backend),
            ours=True,
        )
        for backend in ("cpp", "torch")
    ]
    plain = partial({"tome": tome, "pitome": pitome}[name], r=r)
    return [
        *ours,
        Contender("eager", partial(step, partial(eager, plain))),
        Contender("eager (compiled)", partial(step, partial(compiled, plain)), missing_compiler(), compiled=True),
    ]


def _ours(name: str, r: int, backend: str) -> Merging:
    def merging(x: Tensor, metric: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        with use_backend(backend):
            if name == "tome":
                merge, _ = token_merging.bipartite_soft_matching(metric, r, class_token=True)
            else:
                merge, _ = token_merging.pitome_soft_matching(metric, r, MARGIN, protected=1)
            return token_merging.merge_wavg(merge, x, size)

    return merging


def tome(x: Tensor, metric: Tensor, size: Tensor, *, r: int) -> tuple[Tensor, Tensor]:
    """As ToMe's published code does it: the whole matrix of cosines, a sort, gathers, two scatters, a division."""
    with torch.no_grad():
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
        scores[:, 0, :] = -math.inf
        best, partner = scores.max(dim=-1)
        edges = best.argsort(dim=-1, descending=True).unsqueeze(-1)
        sources, unmerged = edges[:, :r], edges[:, r:].sort(dim=1).values
        destinations = partner.unsqueeze(-1).gather(1, sources)

    def merge(tokens: Tensor) -> Tensor:
        a, b = tokens[:, ::2], tokens[:, 1::2]
        b = b.scatter_reduce(1, _wide(destinations, b), a.gather(1, _wide(sources, a)), "sum")
        return torch.cat([a.gather(1, _wide(unmerged, a)), b], 1)

    return _average(merge, x, size)


def pitome(x: Tensor, metric: Tensor, size: Tensor, *, r: int) -> tuple[Tensor, Tensor]:
    """As PiToMe's published code does it, with the energy of its paper, on the matrix of all cosines."""
    with torch.no_grad():
        unit = F.normalize(metric[:, 1:], dim=-1)
        scores = unit @ unit.transpose(-1, -2)
        order = F.elu(scores - MARGIN).mean(-1).argsort(dim=-1, descending=True).unsqueeze(-1)
        sources, targets, rest = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
        pairs = scores.gather(1, _wide(sources, scores)).gather(2, targets.transpose(1, 2).expand(-1, r, -1))
        destinations = pairs.max(dim=-1).indices.unsqueeze(-1)

    def merge(tokens: Tensor) -> Tensor:
        first, others = tokens[:, :1], tokens[:, 1:]
        a, b = others.gather(1, _wide(sources, others)), others.gather(1, _wide(targets, others))
        b = b.scatter_reduce(1, _wide(destinations, b), a, "sum")
        return torch.cat([first, others.gather(1, _wide(rest, others)), b], 1)

    return _average(merge, x, size)


def _wide(index: Tensor, tokens: Tensor) -> Tensor:
    return index.expand(-1, -1, tokens.shape[-1])


def _average(merge: Callable[[Tensor], Tensor], x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    merged, sizes = merge(x * size), merge(size)
    return merged / sizes, sizes
