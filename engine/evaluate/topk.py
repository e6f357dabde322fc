"""Streaming top-k: the best candidates of every query, without the whole score matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Scores held at once, in elements. 8 Mi float32 scores are 32 MiB.
SCORE_CHUNK = 2**23


def query_blocks(queries: int, candidates: int, chunk: int) -> Iterator[slice]:
    """Slices of the queries such that ``rows x candidates`` is at most ``chunk`` (and at least one row)."""
    if chunk < 1:
        raise ValueError(f"chunk is the number of scores held at once and must be at least 1, got {chunk}")
    rows = max(1, chunk // max(1, candidates))
    return (slice(start, min(start + rows, queries)) for start in range(0, queries, rows))


def topk_scores(queries: Tensor, candidates: Tensor, k: int, *, chunk: int = SCORE_CHUNK) -> tuple[Tensor, Tensor]:
    """The ``k`` best scoring candidates of each query, best first.

    Scores are dot products in float32. Equal scores are ordered by the lowest candidate index; NaN scores count
    as -inf.

    Args:
        queries: [N, D], any floating dtype.
        candidates: [M, D], same device.
        k: number of candidates wanted; min(k, M) are returned.
        chunk: scores held at once; memory is O(chunk + N k).

    Returns:
        scores float32 [N, min(k, M)] and indices int64 [N, min(k, M)].
    """
    scores = torch.empty(len(queries), min(k, len(candidates)), dtype=torch.float32, device=queries.device)
    indices = torch.empty(scores.shape, dtype=torch.int64, device=queries.device)
    columns = candidates.float().T
    for block in query_blocks(len(queries), len(candidates), chunk):
        block_scores = queries[block].float() @ columns
        indices[block] = best_first(block_scores, k)
        scores[block] = block_scores.gather(1, indices[block]).nan_to_num_(
            nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
        )
    return scores, indices


def best_first(scores: Tensor, k: int) -> Tensor:
    """The places of the ``k`` best of each row, int64 [n, min(k, M)]: equal scores by the lowest place, NaN as -inf.

    Args:
        scores: float32 [n, M].
    """
    # Adding zero turns -0.0 into 0.0, so that the two compare as equal below.
    finite = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    position = torch.arange(scores.shape[1], device=scores.device)
    # The low word makes every key distinct and higher for lower indices: torch.topk leaves ties open.
    return ((_sortable(finite) << 32) | (0xFFFFFFFF - position)).topk(min(k, scores.shape[1]), dim=1).indices


def _sortable(scores: Tensor) -> Tensor:
    """float32 -> int64 with the same order: the bits of a negative float, read as an integer, run backwards."""
    bits = scores.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
