"""`project_max` on the `cpp` backend: maxima over tokens, where every column of the projection is a set of one token."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Projection
from .token_sets import TokenSets


def _forward(hidden: TokenSets, weight: Tensor, budget: int, precision: str) -> tuple[Tensor, Tensor]:
    values, chosen = torch.ops.pairtile.project_max_forward(
        hidden.tokens, hidden.starts, hidden.lengths, hidden.keep, weight, budget
    )
    return values, chosen


def _backward(
    hidden: TokenSets, weight: Tensor, chosen: Tensor, grad: Tensor, budget: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    columns = torch.arange(weight.shape[0]), torch.ones(weight.shape[0], dtype=torch.int64)
    dhidden, dweight = (
        torch.zeros(each.shape, dtype=torch.float32) if want else None
        for each, want in zip((hidden.tokens, weight), wanted, strict=True)
    )
    torch.ops.pairtile.max_scores_backward(
        *(weight, *columns, None),
        *(hidden.tokens, hidden.starts, hidden.lengths, hidden.keep),
        0,
        *(grad.T, chosen[None]),
        *(None, None),
        *(dweight, dhidden),
    )
    return (
        None if dhidden is None else dhidden.to(weight.dtype),
        None if dweight is None else dweight.to(weight.dtype),
    )


PROJECTION = Projection(_forward, _backward)
