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
    k = min(k, len(candidates))
    scores = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    columns = candidates.float().T
    position = torch.arange(len(candidates), device=queries.device)
    for block in query_blocks(len(queries), len(candidates), chunk):
        # Adding zero turns -0.0 into 0.0, so that the two compare as equal below.
        block_scores = (queries[block].float() @ columns).nan_to_num_(
            nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
        )
        order = _sortable(block_scores + 0.0) << 32
        # The low word makes every key distinct and higher for lower indices: torch.topk leaves ties open.
        chosen = (order | (0xFFFFFFFF - position)).topk(k, dim=1).indices
        indices[block] = chosen
        scores[block] = block_scores.gather(1, chosen)
    return scores, indices


def _sortable(scores: Tensor) -> Tensor:
    """float32 -> int64 with the same order: the bits of a negative float, read as an integer, run backwards."""
    bits = scores.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
