"""Which tokens are merged into which: what every matching gives, and every merge reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Matching:
    """For each sample of a batch: the tokens that stay, in their new order, and those that are merged into them.

    Attributes:
        kept: int64 [B, S], the token that each of the S new places holds.
        sources: int64 [B, R], tokens that are merged away, N = S + R.
        places: int64 [B, R], the new place that each source is merged into.
        weights: float [B, N] or None: factors of the tokens in a sum, where a method weighs them by more than their size.
    """

    kept: Tensor
    sources: Tensor
    places: Tensor
    weights: Tensor | None = None

    @property
    def tokens(self) -> int:
        """N, tokens before."""
        return self.kept.shape[1] + self.sources.shape[1]

    def place_of(self) -> Tensor:
        """int64 [B, N]: the new place of every token."""
        batch, count = self.kept.shape
        found = self.kept.new_empty(batch, self.tokens)
        found.scatter_(1, self.kept, torch.arange(count, device=found.device).expand(batch, -1))
        return found.scatter_(1, self.sources, self.places)


def unchanged(batch: int, tokens: int, device: torch.device) -> Matching:
    """Nothing is merged."""
    every = torch.arange(tokens, device=device).expand(batch, -1)
    return Matching(every, every[:, :0], every[:, :0])
