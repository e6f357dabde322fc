"""The way from two batches of token sets to a formula of `formulas.FORMULAS`: checks, memory, backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import select_backend
from ..contrastive.arguments import checked_budget, described
from .blocks import dense, over_pairs
from .formulas import Block
from .token_sets import TokenSets, check_mask, check_same_space, padded_sets


def pair_scores(
    name: str,
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    *,
    numbers: Sequence[float] = (),
    shared: Sequence[Tensor] = (),
    copies: int,
    memory_budget: int | None = None,
) -> Tensor:
    """Scores of all pairs of sets by the formula of that name, block by block: [N, M], or [N, K] for candidates.

    Args:
        name, numbers, shared, copies: as in `blocks.over_pairs`.
        x: [N, Lx, D].
        y: [M, Ly, D], or [N, K, Ly, D], K candidates of each x.
        x_mask, y_mask: bool of their shapes without D; None: all tokens count.
        memory_budget: bytes for a block and what its backward keeps.
    """
    first, second, candidates = _paired_sets(x, y, x_mask, y_mask)
    device = x.device
    backend, _ = select_backend(device)
    asked = {"numbers": [float(each) for each in numbers], "shared": shared, "candidates": candidates}
    # A formula states its own precision: autocast would run the products in 16 bits and round their result.
    with torch.autocast(device.type, enabled=False):
        if backend == "reference":
            (scores,) = dense(name, first, second, **asked)  # type: ignore[arg-type]
        else:
            budget = checked_budget(memory_budget, backend)
            (scores,) = over_pairs(name, first, second, budget=budget, copies=copies, **asked)  # type: ignore[arg-type]
    return scores


def _paired_sets(
    x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None
) -> tuple[TokenSets, TokenSets, int]:
    """Both sides, and how many candidates each x has: 0 for all pairs."""
    if not isinstance(y, Tensor) or y.dim() not in (3, 4):
        raise ValueError(f"y is {described(y)}: expected [M, Ly, D], or [N, K, Ly, D] for candidates of each x")
    candidates = 0
    if y.dim() == 4:
        candidates = y.shape[1]
        if y.shape[0] != len(x) or not candidates:
            raise ValueError(f"y {list(y.shape)} with {len(x)} sets x: expected candidates [{len(x)}, K, Ly, D], K > 0")
        if y_mask is not None:
            check_mask(y_mask, y, "y")
            y_mask = y_mask.flatten(0, 1)
        y = y.flatten(0, 1)
    sets = check_same_space(padded_sets(x, x_mask, "x"), padded_sets(y, y_mask, "y"), "x", "y")
    return *sets, candidates


def check_positive(**numbers: float) -> None:
    """Raise unless each is a finite number above 0."""
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r}: expected a finite number above 0")


def either_empty(block: Block) -> Tensor:
    """bool [n, m]: one of the two sets has nothing."""
    return block.x_empty | block.y_empty


def replaced(scores: Tensor, block: Block) -> Tensor:
    """Scores [n, m] of pairs that are there; else -inf for an empty y, then 0 for an empty x, without gradient."""
    return scores.masked_fill(block.x_empty, 0).masked_fill(block.y_empty, -torch.inf)


def counted(block: Block) -> tuple[Tensor, Tensor]:
    """Masks bool [n, 1, Lx] and [1 or n, m, Ly]; all tokens of an empty set, so that numbers that are replaced are finite."""
    return block.x_mask[:, None] | block.x_empty[:, :, None], block.y_mask | block.y_empty[:, :, None]
