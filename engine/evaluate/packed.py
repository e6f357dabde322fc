"""Sets of token embeddings one behind the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """The token embeddings of N images or texts.

    Attributes:
        rows: [T, D], those of the first, then those of the second, and so on.
        cu_seqlens: int64 [N + 1], from 0 to T: item i has the rows from entry i to entry i + 1.
    """

    rows: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of_lengths(cls, rows: Tensor, lengths: Tensor) -> PackedTokens:
        """From rows [T, D] and how many of them each item has, int64 [N]."""
        return cls(rows, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))

    @classmethod
    def of_padded(cls, tokens: Tensor, mask: Tensor) -> PackedTokens:
        """From embeddings [N, L, D] and a mask bool [N, L], True for tokens that count."""
        return cls.of_lengths(tokens[mask], mask.sum(1))

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def slice(self, items: slice) -> PackedTokens:
        """A run of items, as a view."""
        bounds = self.cu_seqlens[items.start : items.stop + 1]
        return PackedTokens(self.rows[int(bounds[0]) : int(bounds[-1])], bounds - bounds[0])

    def select(self, items: Tensor) -> PackedTokens:
        """Some items, int64 [n], in that order; an item may come more than once."""
        lengths = self.lengths[items]
        starts = self.cu_seqlens[:-1][items]
        ends = lengths.cumsum(0)
        within = torch.arange(int(lengths.sum()), device=self.rows.device)
        source = within + (starts - ends + lengths).repeat_interleave(lengths)
        return PackedTokens.of_lengths(self.rows[source], lengths)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Embeddings [N, L, D], zero where there is no token, and their mask bool [N, L]."""
        lengths = self.lengths
        longest = int(lengths.max()) if len(self) else 0
        mask = torch.arange(longest, device=self.rows.device) < lengths.unsqueeze(1)
        tokens = self.rows.new_zeros(len(self), longest, self.rows.shape[1])
        tokens[mask] = self.rows
        return tokens, mask

    def to(self, device: torch.device | str) -> PackedTokens:
        return PackedTokens(self.rows.to(device), self.cu_seqlens.to(device))
