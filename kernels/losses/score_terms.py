"""What losses over token sets share: the pairs of a batch that count, and the terms of a given matrix of their scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..contrastive.arguments import described
from ..distributed import Exchange, Shards, gather, gather_counts, gather_ids, gather_tokens
from ..late_interaction.token_sets import check_mask
from .base import ContrastiveLoss
from .log_domain import cross_entropy, log_sum_exp


class Sets(NamedTuple):
    """Tokens [..., L, D] and their mask bool [..., L], None where all count."""

    tokens: Tensor
    mask: Tensor | None = None

    def present(self) -> Tensor | None:
        """bool [...]: the sets with a token that counts; None: all."""
        if self.mask is not None:
            return self.mask.any(-1)
        shape = self.tokens.shape
        return None if shape[-2] else self.tokens.new_zeros(shape[:-2], dtype=torch.bool)

    def flattened(self) -> Sets:
        """[B, K, L, D] as [B K, L, D]."""
        return Sets(self.tokens.flatten(0, 1), None if self.mask is None else self.mask.flatten(0, 1))

    def rows(self, start: int, stop: int) -> Sets:
        return Sets(self.tokens[start:stop], None if self.mask is None else self.mask[start:stop])

    def only(self, counted: Tensor | None) -> Sets:
        """No token of the others counts; `counted` is bool [B], None for all."""
        if counted is None:
            return self
        mask = counted.view(-1, *[1] * (self.tokens.dim() - 2))
        return Sets(self.tokens, mask.expand(self.tokens.shape[:-1]) if self.mask is None else self.mask & mask)

    def gathered(self, exchange: Exchange | None) -> tuple[Shards, Sets]:
        """Those of all ranks, with the exact gradient."""
        group, wire_dtype = (None, None) if exchange is None else (exchange.group, exchange.wire_dtype)
        shards, tokens, mask = gather_tokens(self.tokens, self.mask, group=group, wire_dtype=wire_dtype)
        return shards, Sets(tokens, mask)

    def present_on_all(self, group: dist.ProcessGroup) -> Tensor:
        """bool [N]: of all ranks' sets those with a token that counts."""
        present = self.present()
        mine = torch.ones(len(self.tokens), device=self.tokens.device) if present is None else present
        shards = gather_counts(len(mine), device=mine.device, group=group)
        return gather_ids(mine.to(torch.int64), shards).bool()


def times(scores: Tensor, scale: float | Tensor) -> Tensor:
    """scale * scores in the dtype of the scores."""
    return scores * (scale.reshape(()).to(scores.dtype) if isinstance(scale, Tensor) else scale)


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """Which scores of a matrix [n, M] are pairs, and which count. Row i's own column is start + i.

    Attributes:
        shards: how the rows lie over the ranks.
        start: the column of this rank's first pair.
        rows: bool [n], the rows whose pair counts; None: all.
        cols: bool [M], the columns that count; None: all.
        counted: pairs of all ranks that count.
        dropped: pairs of all ranks that do not.
    """

    shards: Shards
    start: int
    rows: Tensor | None
    cols: Tensor | None
    counted: int | Tensor
    dropped: int | Tensor

    def scaled(self, scores: Tensor, scale: float | Tensor) -> Tensor:
        """scale * scores [n, M]; 0 where a row or column does not count, so that no -inf meets a gradient of 0."""
        if self.rows is not None and self.cols is not None:
            scores = scores.masked_fill(~(self.rows[:, None] & self.cols), 0)
        return times(scores, scale)

    def own(self, scaled: Tensor) -> Tensor:
        """[n]: each row with its own column."""
        return scaled[:, self.start : self.start + scaled.shape[0]].diagonal()

    def own_columns(self, scaled: Tensor) -> Tensor:
        """bool [n, M]: the pairs."""
        n, m = scaled.shape
        own = torch.arange(self.start, self.start + n, device=scaled.device)
        return torch.arange(m, device=scaled.device) == own[:, None]

    def others(self, scaled: Tensor) -> Tensor:
        """[n, M]: -inf for the pairs, and for whatever does not count."""
        left_out = self.own_columns(scaled)
        if self.rows is not None and self.cols is not None:
            left_out = left_out | ~(self.rows[:, None] & self.cols)
        return scaled.masked_fill(left_out, -torch.inf)

    def block(self, rows: slice) -> ScoredPairs:
        """Those of some of the rows."""
        counted = None if self.rows is None else self.rows[rows]
        return replace(self, start=self.start + rows.start, rows=counted)

    def only_counted(self, terms: Tensor) -> Tensor:
        """0 for rows whose pair does not count."""
        return terms if self.rows is None else terms.masked_fill(~self.rows, 0)


def row_terms(scaled: Tensor, pairs: ScoredPairs, extra: Tensor | None = None, *, hardest: bool = False) -> Tensor:
    """[n]: softplus(R - own score), R the log-sum-exp of a row's others, or the largest of them.

    Args:
        scaled: as `ScoredPairs.scaled` gives it.
        pairs: of these scores.
        extra: [n, K], scores with further columns, -inf for those that do not count.
        hardest: the largest, instead of the log-sum-exp, which makes the cross-entropy.
    """
    others = pairs.others(scaled)
    if extra is not None:
        others = torch.cat([others, extra], 1)
    return pairs.only_counted(cross_entropy(_pooled(others, hardest), pairs.own(scaled)))


def col_terms(scaled: Tensor, pairs: ScoredPairs, *, hardest: bool = False) -> Tensor:
    """[n]: the same of this rank's own columns, over the rows of all ranks."""
    others = _pooled(pairs.others(scaled).T, hardest)
    if pairs.shards.group is not None:
        # What a rank's rows make of each column travels, not the scores.
        _, (everyone,) = gather(others[None], group=pairs.shards.group)
        others = _pooled(everyone.T, hardest)
    own = pairs.own(scaled)
    return pairs.only_counted(cross_entropy(others[pairs.start : pairs.start + len(own)], own))


def _pooled(scores: Tensor, hardest: bool) -> Tensor:
    if not scores.shape[-1]:
        # A rank without rows is still a part of the graph: the others wait for it in the backward.
        return scores.sum(-1) - torch.inf
    return scores.max(-1).values if hardest else log_sum_exp(scores)


def counted_pairs(rows: Sets, cols: Sets, shards: Shards, start: int, *, travelling: bool = False) -> ScoredPairs:
    """The pairs neither of whose sets is empty, of this rank's rows and the columns of all ranks.

    Args:
        rows, cols: [n, Lx, D] and [M, Ly, D]; travelling: cols are this rank's alone, [n, Ly, D].
        shards: of the rows.
        start: the first row's column. On one rank columns before and behind the pairs count unless they are empty.
    """
    n = rows.tokens.shape[0]
    of_rows, of_cols = rows.present(), cols.present()
    if shards.group is None and of_rows is None and of_cols is None:
        return ScoredPairs(shards, start, None, None, n, 0)
    of_rows = _all(rows) if of_rows is None else of_rows
    of_cols = _all(cols) if of_cols is None else of_cols
    counts = of_rows & (of_cols if travelling else of_cols[start : start + n])
    if shards.group is None:
        everyone, columns = counts, torch.cat([of_cols[:start], counts, of_cols[start + n :]])
    else:
        everyone = columns = gather_ids(counts.to(torch.int64), shards).bool()
    counted = everyone.sum()
    return ScoredPairs(shards, start, counts, columns, counted, shards.total - counted)


def _all(sets: Sets) -> Tensor:
    return torch.ones(sets.tokens.shape[0], dtype=torch.bool, device=sets.tokens.device)


class TokenLoss(ContrastiveLoss):
    """A loss over pairs of token sets, which drops those that have nothing to compare."""

    _dropped: int | Tensor = 0

    @property
    def dropped_pairs(self) -> int:
        """Pairs of the whole batch that the last call left out: one of their two sets had no token that counts."""
        return int(self._dropped)

    def _reduced(self, terms: Tensor, pairs: ScoredPairs) -> Tensor:
        """The loss from this rank's terms [n], or from their sum: a mean over the pairs that count, NaN of no such pair."""
        self._dropped = pairs.dropped
        if self.reduction == "none":
            return terms
        share = terms.sum() * pairs.shards.world_size
        if self.reduction == "mean":
            counted = pairs.counted
            share = share / (counted.to(share.dtype) if isinstance(counted, Tensor) else counted or torch.nan)
        return self._finish(share, pairs.shards)


def check_sets(sets: Sets, name: str, dims: int = 3) -> None:
    """Raise unless they are [batch, tokens, D], of 4 dimensions [batch, K, tokens, D], with a mask of their shape."""
    tokens, mask = sets
    if not isinstance(tokens, Tensor) or tokens.dim() != dims:
        expected = "batch" if dims == 3 else "batch, K"
        raise ValueError(f"{name} is {described(tokens)}: expected embeddings [{expected}, tokens, features]")
    if mask is not None:
        check_mask(mask, tokens, name)


def check_token_pairs(x: Sets, y: Sets, names: tuple[str, str]) -> None:
    """Raise unless both are sets, as many of one as of the other."""
    for sets, name in zip((x, y), names, strict=True):
        check_sets(sets, name)
    if x.tokens.shape[0] != y.tokens.shape[0]:
        raise ValueError(
            f"{names[0]} {list(x.tokens.shape)} and {names[1]} {list(y.tokens.shape)}: expected as many sets of both, row i "
            "of both being pair i"
        )
