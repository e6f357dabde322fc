"""The k largest entries of each row, where the lowest index comes first among equals.

torch.topk promises no order among equals, nor which of them it takes. It finds the k-th largest value; equals are then
taken in order, and where they are more than the places left for them, counted out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns [rows, min(k, columns)] of the largest entries of [rows, columns], largest first.

    Which -inf are among them is left open.
    """
    width = scores.shape[1]
    if k >= width:
        return ordered(scores, torch.arange(width, device=scores.device).expand(scores.shape))
    if k == 1:  # torch promises the first of several
        values, columns = scores.max(1, keepdim=True)
        return values, columns
    values, columns = scores.topk(k + 1)
    last, next_one = values[:, k - 1], values[:, k]
    columns = columns[:, :k]
    undecided = ((last == next_one) & (last > -torch.inf)).nonzero().squeeze(1)
    if len(undecided):
        columns = columns.index_copy(0, undecided, _counted_out(scores[undecided], last[undecided].unsqueeze(1), k))
    columns = columns.sort(1).values
    return ordered(scores.gather(1, columns), columns)


def merged(values: Tensor, indices: Tensor, more_values: Tensor, more_indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of two lists for each row, of which the second has the higher indices."""
    values, indices = ordered(torch.cat([values, more_values], 1), torch.cat([indices, more_indices], 1))
    return values[:, :k], indices[:, :k]


def ordered(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Largest first; equals stay in the order in which they are given."""
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def _counted_out(scores: Tensor, last: Tensor, k: int) -> Tensor:
    """The k columns of each row that are above `last`, or equal to it and first, in ascending order."""
    above = ~(scores <= last)  # as topk counts NaN
    equal = scores == last
    places = k - above.sum(1, keepdim=True)
    taken = above | equal & (equal.cumsum(1, dtype=torch.int32) <= places)
    return taken.nonzero()[:, 1].view(-1, k)
