"""Calls of late interaction that start every Triton kernel of it, every way that there is, at the smallest sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pairtile.kernels import LogSumExpPooling, MaxPooling, SoftmaxPooling, project_max
from pairtile.kernels.late_interaction.pooling import Pooling
from pairtile.kernels.late_interaction.scores import token_scores
from pairtile.kernels.late_interaction.token_sets import TokenSets, packed_sets, padded_sets

#: More tokens than a tile of float32 holds.
LONG = 70


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Tokens of small integers, half of them twice: their products are exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-2, 3, shape, generator=generator).float()
    flat = tokens.view(-1, shape[-1])
    half = len(flat) // 2
    flat[torch.randperm(len(flat), generator=generator)[:half]] = flat[
        torch.randperm(len(flat), generator=generator)[:half]
    ].clone()
    return tokens


def masked(count: int, length: int, *, empty: int, seed: int = 1) -> Tensor:
    """A mask with holes, of which one set has nothing left."""
    mask = torch.rand(count, length, generator=torch.Generator().manual_seed(seed)) > 0.3
    mask[empty] = False
    return mask


def sides(
    n: int, lx: int, m: int, ly: int, width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[TokenSets, TokenSets]:
    """Padded sets of integers; those that do not count hold NaN."""
    found = []
    for name, count, length, seed in (("x", n, lx, 2), ("y", m, ly, 3)):
        mask = masked(count, length, empty=seed - 2, seed=seed)
        tokens = integers(count, length, width, seed=seed).masked_fill(~mask[:, :, None], torch.nan).to(dtype)
        found.append(padded_sets(tokens.to(device), mask.to(device), name))
    return found[0], found[1]


def packed(count: int, longest: int, width: int, seed: int) -> TokenSets:
    """Ragged sets side by side, an empty one among them."""
    lengths = torch.randint(1, longest + 1, (count,), generator=torch.Generator().manual_seed(seed))
    lengths[0], lengths[-1] = longest, 0
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return packed_sets(integers(int(bounds[-1]), width, seed=seed), bounds, longest, "tokens")


def scored(x: TokenSets, y: TokenSets, **asked: object) -> list[Tensor]:
    """Scores and gradients of both sides for upstream gradients that differ from pair to pair."""
    leaves = [each.tokens.detach().requires_grad_() for each in (x, y)]
    sets = (each.with_tokens(leaf) for each, leaf in zip((x, y), leaves, strict=True))
    scores = token_scores(*sets, **asked)  # type: ignore[arg-type]
    upstream = [torch.linspace(-1, 2, each.numel(), device=each.device).view(each.shape).to(each) for each in scores]
    total = sum((each.masked_fill(each.isinf(), 0) * up).sum() for each, up in zip(scores, upstream, strict=True))
    return [*scores, *torch.autograd.grad(total, leaves)]


def projected(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    hidden, weight = integers(3, 5, 9, seed=4).to(device, dtype), integers(21, 9, seed=5).to(device, dtype)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    mask = masked(3, 5, empty=1, seed=6).to(device)
    largest = project_max(hidden, weight, None, mask)
    total = (largest.masked_fill(~mask.any(1, keepdim=True), 0) * torch.arange(21, device=device)).sum()
    return [largest, *torch.autograd.grad(total, (hidden, weight))]


_BOTH = {"rows": True, "cols": True}


def _call(
    x: Callable[[], tuple[TokenSets, TokenSets]], pooling: Pooling, **asked: object
) -> Callable[[], list[Tensor]]:
    return lambda: scored(*x(), pooling=pooling, **asked)


_MAX = MaxPooling()
#: No argument -> results and gradients.
LATE_CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "x held": _call(partial(sides, 3, 5, 4, 9, 20), _MAX, **_BOTH),
    "y held": _call(partial(sides, 2, LONG, 4, 3, 20), _MAX, **_BOTH),
    "both long": _call(partial(sides, 2, LONG, 2, LONG + 3, 7), _MAX, **_BOTH),
    "rows, y held": _call(partial(sides, 2, LONG, 3, 4, 8), _MAX),
    "cols, x held": _call(partial(sides, 3, 4, 2, LONG, 8), _MAX, rows=False, cols=True),
    "candidates": _call(partial(sides, 3, 5, 6, 9, 20), _MAX, candidates=2, **_BOTH),
    "candidates, y held": _call(partial(sides, 2, 9, 4, 3, 20), _MAX, candidates=2, **_BOTH),
    "candidates, long": _call(partial(sides, 2, LONG, 4, LONG, 8), _MAX, candidates=2),
    "packed": _call(lambda: (packed(4, 6, 8, 7), packed(3, 9, 8, 8)), _MAX, **_BOTH),
    "nothing kept": _call(partial(sides, 3, 5, 4, 9, 20), _MAX, memory_budget=200, **_BOTH),
    "packed, nothing kept": _call(lambda: (packed(4, 6, 8, 7), packed(3, 9, 8, 8)), _MAX, memory_budget=200),
    "softmax": _call(partial(sides, 3, 5, 4, 9, 20), SoftmaxPooling(2.0), **_BOTH),
    "softmax, candidates": _call(partial(sides, 2, 5, 4, 9, 8), SoftmaxPooling(2.0), candidates=2, **_BOTH),
    "softmax, nothing kept": _call(partial(sides, 3, 5, 4, 9, 8), SoftmaxPooling(2.0), memory_budget=200),
    "log-sum-exp, long": _call(partial(sides, 2, LONG, 2, 5, 8), LogSumExpPooling(2.0), **_BOTH),
    "project_max": projected,
}
#: Those of them that differ in how pairs and rows are addressed.
LATE_WAYS = ("x held", "both long", "candidates", "candidates, y held", "candidates, long", "softmax, candidates")
