"""Calls of token merging that start every Triton kernel of it, every way that there is, at the smallest sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pairtile.kernels.token_merging import Matching, bipartite_matching, merge_tokens
from pairtile.kernels.token_merging.combine import combine, spread
from pairtile.kernels.token_merging.similarity import Partners, best_partners, energies
from triton_late import integers, masked


def some_matching(batch: int, tokens: int, merged: int, places: int | None = None) -> Matching:
    """Tokens drawn at random, merged into the first places; the last sample's into one."""
    order = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(tokens)).argsort(1)
    kept, sources = order[:, merged:], order[:, :merged]
    to = torch.randint(places or tokens - merged, sources.shape, generator=torch.Generator().manual_seed(1))
    to[-1] = 0
    return Matching(kept, sources, to)


def _partners(partners: Partners) -> list[Tensor]:
    x, keep = integers(2, 67, 20), masked(2, 67, empty=0)
    y, y_keep = (x, keep) if partners else (integers(2, 35, 20, seed=1), masked(2, 35, empty=1, seed=2))
    found = best_partners(x, y, partners=partners)
    return [*found, *best_partners(x, y, x_keep=keep, y_keep=y_keep, partners=partners)]


def _tome() -> list[Tensor]:
    """Signs of a width whose root is a power of two: every cosine is exact."""
    metric = integers(2, 71, 16).sign().add(0.5).sign().bfloat16()
    found = [bipartite_matching(metric, 30, *special) for special in ((False, False), (True, True))]
    return [tensor for each in found for tensor in (each.kept, each.sources, each.places)]


def _merged() -> list[Tensor]:
    """More sources than are looked at together, more places and more channels than a tile has."""
    matching, x = some_matching(2, 150, 70), integers(2, 150, 270).requires_grad_()
    size = torch.randint(1, 5, (2, 150, 1), generator=torch.Generator().manual_seed(2)).float()
    merged, sizes = merge_tokens(x, matching, size)
    (grad,) = torch.autograd.grad(merged, x, integers(*merged.shape, seed=3))
    return [merged.detach(), sizes, grad]


def _plain() -> list[Tensor]:
    matching, x = some_matching(2, 13, 4), integers(2, 13, 7).mT.contiguous().mT
    merged = combine(x, matching, None, None)
    return [merged, spread(merged, matching)]


#: No argument -> results.
TOKEN_CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "partners": lambda: _partners(Partners.ALL),
    "others": lambda: _partners(Partners.OTHERS),
    "later": lambda: _partners(Partners.LATER),
    "energies": lambda: [energies(integers(2, 67, 20) / 8, 0.25, 0.5)],
    "tome": _tome,
    "merged": _merged,
    "plain": _plain,
}
#: Those of them that differ in how rows are addressed.
TOKEN_WAYS = ("later", "energies", "merged")
