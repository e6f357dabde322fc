"""The best documents of a corpus that is read block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import select_backend
from ..contrastive.arguments import checked_budget
from .maxsim import aggregated, unit
from .pooling import MaxPooling, Pooling
from .scores import token_scores
from .token_sets import TokenSets, check_boundaries, check_mask, check_tokens, packed_sets, padded_sets

#: A block of documents: [n, L, D], or that and its mask [n, L].
DocumentBlock = Tensor | tuple[Tensor, Tensor | None]

_MAX = MaxPooling()
_MOST_DOCUMENTS = 4096
# Bytes that a score takes while it is sorted in: itself, its copy beside the best so far, and sort's two results.
_BYTES_OF_SCORE = 24


class TopDocuments(NamedTuple):
    """The best documents of each query, the best first.

    Attributes:
        scores: [Nq, k], float32 (float64 for float64 tokens); -inf where a query has fewer than k documents.
        indices: int64 [Nq, k], positions in the corpus; -1 where there is none.
    """

    scores: Tensor
    indices: Tensor


@torch.no_grad()
def maxsim_topk(
    q: Tensor,
    corpus: Tensor | Iterable[DocumentBlock],
    k: int,
    *,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    cu_seqlens_d: Tensor | None = None,
    pooling: Pooling = _MAX,
    aggregate: str = "sum",
    normalize: bool = False,
    precision: str | None = None,
    memory_budget: int | None = None,
) -> TopDocuments:
    """The k documents of a corpus with the highest `maxsim` for each query, in memory that does not grow with the corpus.

    The corpus is read once, in blocks of up to 4096 documents that are scored and sorted into the best so far. It may lie in
    a file (a memory-mapped tensor) or on the CPU beside queries on a GPU: each block is moved as it comes. Among equal
    scores the lower index wins; a document whose tokens are all masked is never among the best.

    Args:
        q: queries [Nq, Lq, D].
        corpus: documents [Nd, Ld, D]; or, with `cu_seqlens_d`, all their tokens [T, D]; or an iterable of blocks [n, L, D]
            or ([n, L, D], mask [n, L]), counted through.
        k: how many, at least 1.
        q_mask: bool [Nq, Lq], True for tokens that count.
        d_mask: bool [Nd, Ld] beside a padded corpus.
        cu_seqlens_d: int32 or int64 [Nd + 1], boundaries of a packed corpus.
        pooling, aggregate, normalize, precision, memory_budget: as in `maxsim`.

    Returns:
        `TopDocuments`, without gradient.

    Raises:
        ValueError, TypeError: as `maxsim`; a k below 1, or a mask or boundaries that do not fit the form of the corpus.
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}: expected a whole number of at least 1")
    queries = padded_sets(unit(q) if normalize else q, q_mask, "q")
    backend, _ = select_backend(q.device)
    budget = checked_budget(memory_budget, backend)
    documents = max(1, min(_MOST_DOCUMENTS, budget // 2 // (_BYTES_OF_SCORE * max(1, queries.count))))
    dtype = torch.promote_types(q.dtype, torch.float32)
    best = q.new_full((queries.count, k), -torch.inf, dtype=dtype)
    indices = q.new_full((queries.count, k), -1, dtype=torch.int64)
    first = 0
    for tokens, mask, boundaries in _blocks(corpus, d_mask, cu_seqlens_d, documents):
        sets = _moved(tokens, mask, boundaries, q.device, normalize)
        (scores,) = token_scores(
            queries, sets, pooling=pooling, names=("q", "corpus"), precision=precision, memory_budget=memory_budget
        )
        best, indices = _merged(best, indices, scores.to(dtype), first)
        first += sets.count
    return TopDocuments(aggregated(best, queries, aggregate), indices)


def _merged(best: Tensor, indices: Tensor, scores: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The best of both. What was found before has lower indices and stands in front: a stable sort keeps it there."""
    found = torch.arange(first, first + scores.shape[1], device=scores.device).expand(scores.shape)
    # An empty document never counts, not even where there is no other.
    found = found.masked_fill(scores == -torch.inf, -1)
    values, order = torch.cat([best, scores], 1).sort(dim=1, descending=True, stable=True)
    k = best.shape[1]
    return values[:, :k].contiguous(), torch.cat([indices, found], 1).gather(1, order[:, :k])


def _blocks(
    corpus: Tensor | Iterable[DocumentBlock], mask: Tensor | None, boundaries: Tensor | None, documents: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """(tokens, mask, boundaries) of at most so many documents each."""
    if not isinstance(corpus, Tensor):
        if mask is not None or boundaries is not None:
            raise ValueError("d_mask and cu_seqlens_d belong to a corpus in one tensor: give each block its own mask")
        for block in corpus:
            tokens, own = block if isinstance(block, tuple) else (block, None)
            yield from _padded_blocks(tokens, own, documents)
    elif boundaries is None:
        yield from _padded_blocks(corpus, mask, documents)
    else:
        if mask is not None:
            raise ValueError("d_mask beside cu_seqlens_d: a packed corpus has no padding to mask")
        check_tokens(corpus, "corpus", 2, "[all tokens, features] beside cu_seqlens_d")
        boundaries = check_boundaries(boundaries.cpu(), corpus.shape[0], "corpus")
        for start in range(0, len(boundaries) - 1, documents):
            part = boundaries[start : start + documents + 1]
            yield corpus[int(part[0]) : int(part[-1])], None, part - part[0]


def _padded_blocks(
    tokens: Tensor, mask: Tensor | None, documents: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    check_tokens(tokens, "corpus", 3, "[documents, tokens, features], or cu_seqlens_d for a packed corpus")
    if mask is not None:
        check_mask(mask, tokens, "corpus")
    for start in range(0, len(tokens), documents):
        part = slice(start, start + documents)
        yield tokens[part], None if mask is None else mask[part], None


def _moved(
    tokens: Tensor, mask: Tensor | None, boundaries: Tensor | None, device: torch.device, normalize: bool
) -> TokenSets:
    tokens = tokens.to(device, non_blocking=True)
    if normalize:
        tokens = unit(tokens)
    if boundaries is None:
        return padded_sets(tokens, None if mask is None else mask.to(device, non_blocking=True), "corpus")
    longest = int(boundaries.diff().max()) if len(boundaries) > 1 else 0
    return packed_sets(tokens, boundaries.to(device, non_blocking=True), longest, "corpus")
