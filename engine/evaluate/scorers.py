"""What ranks candidates: cosines of pooled embeddings, late interaction, or the second after the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ...kernels import maxsim, maxsim_varlen
from .packed import PackedTokens
from .topk import SCORE_CHUNK, best_first

#: Scores closer than this, relative to the lengths of the vectors, are a tie. Two equal embeddings can differ by about
#: 1e-7 in a float32 product, depending on where in the matrix they stand; a tie must not be decided by that.
TIE_TOLERANCE = 1e-6
#: Token embeddings of one side in a block, in elements: 16 Mi float32 numbers are 64 MiB.
TOKEN_BLOCK = 2**24

Scores = Literal["pooled", "tokens", "rerank"]


class Scorer(Protocol):
    """The scores of N queries with M candidates, higher is better, a block of queries at a time."""

    queries: int
    candidates: int

    def scores(self, rows: slice) -> Tensor:
        """[n, M], the scores of the queries of ``rows``."""
        ...

    def tolerance(self, rows: slice, best: Tensor) -> Tensor:
        """[n]: scores closer than this to that of candidate ``best`` [n] are as good as equal."""
        ...


class PooledScorer:
    """Dot products of queries [N, D] and candidates [M, D]; 16-bit inputs in float32, float64 stays float64."""

    def __init__(self, queries: Tensor, candidates: Tensor) -> None:
        if queries.dim() != 2 or candidates.dim() != 2 or queries.shape[1] != candidates.shape[1]:
            raise ValueError(f"expected [N, D] and [M, D], got {tuple(queries.shape)}, {tuple(candidates.shape)}")
        dtype = torch.float64 if torch.float64 in (queries.dtype, candidates.dtype) else torch.float32
        self._queries, self._candidates = queries, candidates.to(dtype)
        self._norms = self._candidates.norm(dim=1)
        self.queries, self.candidates = len(queries), len(candidates)

    def scores(self, rows: slice) -> Tensor:
        return self._block(rows) @ self._candidates.T

    def tolerance(self, rows: slice, best: Tensor) -> Tensor:
        return TIE_TOLERANCE * self._block(rows).norm(dim=1) * self._norms[best]

    def _block(self, rows: slice) -> Tensor:
        return self._queries[rows].to(self._candidates.dtype)


class TokenScorer:
    """FILIP's similarity of all pairs (arXiv:2111.07783): the mean over a query's tokens of the maximum over a candidate's.

        score_ij = 1 / |q_i| sum_{p in q_i} max_{r in d_j} <q_ip, d_jr>

    So texts that look for images take the mean over words of the best patch, and images that look for texts the mean over
    patches of the best word. Both sides are read in blocks of tokens, which alone are moved to ``device``.
    """

    def __init__(self, queries: PackedTokens, candidates: PackedTokens, device: torch.device | str) -> None:
        self._queries, self._candidates = queries, candidates
        self._device = device
        self.queries, self.candidates = len(queries), len(candidates)

    def scores(self, rows: slice) -> Tensor:
        queries = self._queries.slice(rows)
        scores = torch.empty(len(queries), self.candidates, device=self._device)
        for columns in _token_blocks(self._candidates):
            d = self._candidates.slice(columns).to(self._device)
            for part in _token_blocks(queries):
                q = queries.slice(part).to(self._device)
                scores[part, columns] = maxsim_varlen(q.rows, q.cu_seqlens, d.rows, d.cu_seqlens, aggregate="mean")
        return scores

    def tolerance(self, rows: slice, best: Tensor) -> Tensor:
        return torch.full(best.shape, TIE_TOLERANCE, device=best.device)  # of unit vectors


class RerankScorer:
    """The ``top`` best of a first stage in the order of late interaction, as in :class:`TokenScorer`; the others behind
    them, in the order of the first stage.
    """

    def __init__(
        self,
        first: PooledScorer,
        queries: PackedTokens,
        candidates: PackedTokens,
        *,
        top: int,
        device: torch.device | str,
    ) -> None:
        self._first, self._top, self._device = first, min(top, len(candidates)), device
        self._queries, self._candidates = queries, candidates
        self.queries, self.candidates = len(queries), len(candidates)

    def scores(self, rows: slice) -> Tensor:
        scores = self._first.scores(rows).float()
        places = best_first(scores, self._top)
        # Cosines, and so do means of cosines, lie in [-1, 1]: this keeps the two groups apart.
        scores -= 4
        queries = self._queries.slice(rows)
        longest = max(1, int(self._candidates.lengths.max()))
        step = max(1, TOKEN_BLOCK // max(1, self._top * longest * self._candidates.rows.shape[1]))
        for start in range(0, len(queries), step):
            part = slice(start, min(start + step, len(queries)))
            scores[part] = scores[part].scatter(1, places[part], self._late(queries.slice(part), places[part]))
        return scores

    def tolerance(self, rows: slice, best: Tensor) -> Tensor:
        return torch.full(best.shape, TIE_TOLERANCE, device=best.device)

    def _late(self, queries: PackedTokens, places: Tensor) -> Tensor:
        """[n, top]: the scores of each query with its own candidates."""
        chosen = self._candidates.select(places.flatten().to(self._candidates.rows.device)).to(self._device)
        d, d_mask = (each.unflatten(0, places.shape) for each in chosen.padded())
        q, q_mask = queries.to(self._device).padded()
        return maxsim(q, d, q_mask, d_mask, aggregate="mean")


class GroupMeanScorer:
    """Means of another scorer's scores over consecutive groups of its candidates: prompts of one class, say."""

    def __init__(self, scorer: Scorer, sizes: list[int]) -> None:
        self._scorer, self._sizes = scorer, sizes
        self.queries, self.candidates = scorer.queries, len(sizes)

    def scores(self, rows: slice) -> Tensor:
        return torch.stack([part.mean(1) for part in self._scorer.scores(rows).split(self._sizes, dim=1)], dim=1)

    def tolerance(self, rows: slice, best: Tensor) -> Tensor:
        return torch.full(best.shape, TIE_TOLERANCE, device=best.device)


@dataclass(frozen=True, eq=False)
class Side:
    """The images or the texts of a split: pooled embeddings [N, D] and, for late interaction, those of their tokens."""

    pooled: Tensor
    tokens: PackedTokens | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    def select(self, items: Tensor) -> Side:
        """Some items, int64 [n] on the CPU."""
        tokens = None if self.tokens is None else self.tokens.select(items.to(self.tokens.rows.device))
        return Side(self.pooled[items.to(self.pooled.device)], tokens)


@dataclass(frozen=True)
class Scoring:
    """Which scores rank candidates.

    Attributes:
        by: "pooled": dot products of the pooled embeddings; "tokens": late interaction of all pairs; "rerank": late
            interaction of the ``top`` best by the pooled ones.
        top: candidates of a query that are scored again.
        device: where scores are computed.
        chunk: scores held at once.
    """

    by: Scores = "pooled"
    top: int = 100
    device: torch.device | str = "cpu"
    chunk: int = SCORE_CHUNK

    def scorer(self, queries: Side, candidates: Side) -> Scorer:
        """The scorer of these queries and candidates, whose tokens are given unless `by` is "pooled"."""
        if self.by == "tokens":
            return TokenScorer(_tokens(queries), _tokens(candidates), self.device)
        first = PooledScorer(queries.pooled.to(self.device), candidates.pooled.to(self.device))
        if self.by == "pooled":
            return first
        return RerankScorer(first, _tokens(queries), _tokens(candidates), top=self.top, device=self.device)


def _tokens(side: Side) -> PackedTokens:
    if side.tokens is None:
        raise ValueError('scores by "tokens" and "rerank" need token embeddings; these sides have pooled ones alone')
    return side.tokens


def _token_blocks(sets: PackedTokens) -> Iterator[slice]:
    """Runs of sets of at most TOKEN_BLOCK elements, one set at least."""
    bounds = sets.cu_seqlens.tolist()
    most = TOKEN_BLOCK // max(1, sets.rows.shape[1])
    start = 0
    for end in range(1, len(bounds)):
        if end == len(bounds) - 1 or bounds[end + 1] - bounds[start] > most:
            yield slice(start, end)
            start = end
