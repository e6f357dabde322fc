"""Alignment of two sequences of tokens that keeps their order, for all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .formulas import Block, formula
from .pair_formulas import check_positive, either_empty, pair_scores

# Outside of the matrix: so large that no path enters it, so small that sums of it are finite in float32.
_BARRED = 1e10


def soft_dtw(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    gamma: float = 0.1,
    memory_budget: int | None = None,
) -> Tensor:
    """Soft dynamic time warping of sequences under the cost 1 - <x_ip, y_jr> (soft-DTW, arXiv:1703.01541).

        R_pr = cost_pr + softmin(R_{p-1,r-1}, R_{p-1,r}, R_{p,r-1}),   softmin(a) = -gamma log sum_k exp(-a_k / gamma)

    and the distance is R at the last tokens of both: the smallest (softly) cost of a path that never goes back. Sugar
    (arXiv:2411.00304) compares interleaved sequences of text and images by such an alignment. It is below the cost of the
    best path, by up to gamma log(number of paths), and can be negative.

    Args:
        x: [N, Lx, D], unit vectors where the cost is to be the cosine distance; in their order.
        y: [M, Ly, D]; or [N, K, Ly, D], K candidates of each x.
        x_mask, y_mask: bool, of the tokens' shapes without D, True for tokens that count; None: all. Those between
            others too are left out of the sequence.
        gamma: above 0, in units of cost; towards 0 it is dynamic time warping.
        memory_budget: bytes for a block of pairs and what its backward keeps.

    Returns:
        Distances [N, M] or [N, K], float32 (float64 for float64 tokens); inf where either is empty, without gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, masks or devices that do not fit, or options out of their range.
    """
    check_positive(gamma=gamma)
    return pair_scores("warped", x, y, x_mask, y_mask, numbers=(gamma,), copies=28, memory_budget=memory_budget)


@formula
def warped(block: Block, numbers: Sequence[float], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Numbers: gamma. Diagonal by diagonal, all entries of one at once."""
    (gamma,) = numbers
    x, x_lengths = _in_front(block.x, block.x_mask)
    y, y_lengths = _in_front(block.y, block.y_mask)
    cost = 1 - Block(x, block.x_mask, y, block.y_mask).similarity
    n, m, lx, ly = cost.shape
    if not lx or not ly:
        return (cost.sum((2, 3)) + torch.inf,)
    skewed = _skewed(cost)
    barred = cost.new_full((n, m, lx), _BARRED)
    before, last = barred, skewed[:, :, 0]
    diagonals = [last]
    for k in range(1, lx + ly - 1):
        # Entry p of diagonal k is R_{p, k - p}: its neighbours are entries p - 1 and p of the last, p - 1 of the one before.
        entering = torch.stack([_shifted(before), _shifted(last), last], -1)
        reached = skewed[:, :, k] - gamma * (-entering / gamma).logsumexp(-1)
        before, last = last, reached.clamp(max=_BARRED)
        diagonals.append(last)
    ends = (x_lengths[:, None] + y_lengths - 2).clamp(min=0), (x_lengths - 1).clamp(min=0)[:, None].expand(n, m)
    paths = torch.stack(diagonals, 2).flatten(2)
    distance = paths.gather(2, (ends[0] * lx + ends[1]).unsqueeze(2)).squeeze(2)
    return (distance.masked_fill(either_empty(block), torch.inf),)


def _in_front(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Those that count first, in their order, and how many there are."""
    order = (~mask).to(torch.uint8).sort(dim=-1, stable=True).indices
    return tokens.take_along_dim(order.unsqueeze(-1), -2), mask.sum(-1)


def _skewed(cost: Tensor) -> Tensor:
    """[n, m, Lx + Ly - 1, Lx]: entry (k, p) is the cost of (p, k - p), barred where that is outside."""
    n, m, lx, ly = cost.shape
    diagonals = lx + ly - 1
    # Rows one longer than there are diagonals, read as if they were not, move by one more to the right each.
    flat = F.pad(cost, (0, lx), value=_BARRED).flatten(2)[:, :, : lx * diagonals]
    return flat.view(n, m, lx, diagonals).transpose(2, 3)


def _shifted(diagonal: Tensor) -> Tensor:
    """Entry p - 1 in place of p."""
    return F.pad(diagonal[..., :-1], (1, 0), value=_BARRED)
