"""One-to-one matching of the tokens of two sets, for all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .formulas import Block, formula
from .pair_formulas import pair_scores, replaced


def bipartite_similarity(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    memory_budget: int | None = None,
) -> Tensor:
    """Mean similarity of matched tokens under the best one-to-one matching: LightCLIP's token alignment (arXiv:2312.00674).

        score_ij = max over matchings sigma of mean_k <x_i,p_k, y_j,sigma(p_k)>,  min(m, n) matched pairs of m and n tokens

    The matching is exact, by shortest augmenting paths in float64, all pairs of a block side by side, and has no gradient:
    that of the score goes to the matched tokens. It is found again in the backward.

    Args:
        x: [N, Lx, D], patches, say; unit vectors in the paper.
        y: [M, Ly, D], words; or [N, K, Ly, D], K candidates of each x.
        x_mask, y_mask: bool, of the tokens' shapes without D, True for tokens that count; None: all.
        memory_budget: bytes for a block of pairs and what its backward keeps.

    Returns:
        [N, M] or [N, K], float32 (float64 for float64 tokens). -inf for an empty y, else 0 for an empty x, without gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, masks or devices that do not fit.
    """
    return pair_scores("matched", x, y, x_mask, y_mask, copies=12, memory_budget=memory_budget)


@formula
def matched(block: Block, numbers: Sequence[float], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Without numbers."""
    similarity = block.similarity
    n, m, lx, ly = similarity.shape
    if not lx or not ly:
        return (replaced(similarity.sum((2, 3)), block),)
    of_x, of_y = block.x_mask[:, None].expand(n, m, lx), block.y_mask.expand(n, m, ly)
    given = similarity.detach()
    if lx > ly:
        partner = best_matching(given.transpose(2, 3).flatten(0, 1), of_y.flatten(0, 1), of_x.flatten(0, 1))
        chosen = similarity.gather(2, partner.view(n, m, 1, ly)).squeeze(2)
        counts = of_y & of_x.gather(2, partner.view(n, m, ly))
    else:
        partner = best_matching(given.flatten(0, 1), of_x.flatten(0, 1), of_y.flatten(0, 1))
        chosen = similarity.gather(3, partner.view(n, m, lx, 1)).squeeze(3)
        counts = of_x & of_y.gather(2, partner.view(n, m, lx))
    scores = chosen.masked_fill(~counts, 0).sum(-1) / counts.sum(-1).clamp(min=1)
    # A token that is NaN may be left unmatched.
    lost = (given.isnan() & of_x.unsqueeze(3) & of_y.unsqueeze(2)).any(-1).any(-1)
    scores = scores.masked_fill(lost, torch.nan)
    return (replaced(scores, block),)


@torch.no_grad()
def best_matching(weights: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The matching of greatest total weight, for each of P matrices.

    Args:
        weights: [P, R, C], R <= C.
        rows, cols: bool [P, R] and [P, C], those that count.

    Returns:
        int64 [P, R], a different column for each row. Rows and columns that count are matched with each other as far as they
        go; a row is unmatched where its column, or itself, does not count.
    """
    # What does not count costs 0, all else less: another pair that counts always gains.
    counted = rows[:, :, None] & cols[:, None]
    wide = weights.double().nan_to_num().masked_fill(~counted, 0)
    least = wide.amin((1, 2), keepdim=True)
    cost = (least - 1 - wide).masked_fill(~counted, 0)
    return _assigned(cost)


def _assigned(cost: Tensor) -> Tensor:
    """The assignment of least cost [P, R, C]: the Hungarian method, a row at a time, its searches in step.

    Column C is where each search starts: `row_of` [P, C + 1] is the row that holds a column, R where none does.
    """
    count, r, c = cost.shape
    each = torch.arange(count, device=cost.device)
    # A row R of zeros: searches that are over keep reading it.
    cost = torch.cat([cost, cost.new_zeros(count, 1, c)], 1)
    of_rows, of_cols = cost.new_zeros(count, r + 1), cost.new_zeros(count, c + 1)
    row_of = torch.full((count, c + 1), r, device=cost.device)
    for row in range(r):
        row_of[:, c] = row
        column = torch.full((count,), c, device=cost.device)
        reached, came_from = _search(cost, row_of, of_rows, of_cols, column)
        column = reached
        # Back along the path every column takes over the row of the one before it.
        while bool((moving := column != c).any()):
            previous = came_from[each, column.clamp(max=c - 1)].where(moving, column)
            row_of[each, column] = row_of[each, previous].where(moving, row_of[each, column])
            column = previous
    taken = row_of[:, :c]
    columns = torch.arange(c, device=cost.device).expand(count, c)
    found = torch.zeros(count, r + 1, dtype=torch.int64, device=cost.device).scatter_(1, taken, columns)
    return found[:, :r]


def _search(cost: Tensor, row_of: Tensor, of_rows: Tensor, of_cols: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Dijkstra's search for a free column from column C of each matrix; the potentials are kept up in place.

    Returns:
        (the free column [P], for each column the one before it on its path [P, C]).
    """
    count, _, c = cost.shape
    free = cost.shape[1] - 1
    each = torch.arange(count, device=cost.device)
    distance = cost.new_full((count, c), torch.inf)
    came_from = torch.full((count, c), c, device=cost.device)
    used = torch.zeros(count, c + 1, dtype=torch.bool, device=cost.device)
    searching = torch.ones(count, dtype=torch.bool, device=cost.device)
    # One step for each row that has a column by now, and one more.
    for _ in range(free + 1):
        if not searching.any():
            break
        used[each, column] |= searching
        row = row_of[each, column]
        slack = cost[each, row] - of_rows[each, row, None] - of_cols[:, :c]
        closer = (slack < distance) & ~used[:, :c] & searching[:, None]
        distance = slack.where(closer, distance)
        came_from = column[:, None].where(closer, came_from)
        nearest = distance.masked_fill(used[:, :c], torch.inf).min(1)
        delta = nearest.values.where(searching, 0)
        # The rows of used columns, each of which holds one.
        of_rows.scatter_add_(1, row_of.where(used, free), delta[:, None] * used)
        of_cols -= delta[:, None] * used
        distance = (distance - delta[:, None]).where(~used[:, :c], distance)
        column = nearest.indices.where(searching, column)
        searching = searching & (row_of[each, column] != free)
    return column, came_from
