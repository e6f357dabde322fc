"""Sets of token embeddings, padded or packed, in the one form that every backend reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contrastive.arguments import FEATURE_DTYPES, described


@dataclass(frozen=True, eq=False)
class TokenSets:
    """N sets of tokens, each a run of rows of one matrix.

    Padded and packed batches are both of this form without a copy, and no length is read back from the GPU.

    Attributes:
        tokens: [T, D].
        starts: int64 [N], the first row of each set.
        lengths: int64 [N], rows of each set, those that `keep` leaves out among them.
        keep: bool [T], False for rows that do not count, whatever they hold; None if all count.
        longest: at least the largest of `lengths`.
        padded: L where set i is the rows i L to (i + 1) L; None for a packed batch.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    keep: Tensor | None
    longest: int
    padded: int | None

    @property
    def count(self) -> int:
        return self.starts.shape[0]

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Which rows are whose: what a backward saves, so that torch notices when a mask is written to before it."""
        return self.starts, self.lengths, self.keep

    def at(self, tokens: Tensor, places: Sequence[Tensor | None]) -> TokenSets:
        """The same sets of other embeddings, their `places` as a backward finds them saved."""
        starts, lengths, keep = places
        assert starts is not None
        assert lengths is not None
        return TokenSets(tokens, starts, lengths, keep, self.longest, self.padded)

    def with_tokens(self, tokens: Tensor) -> TokenSets:
        """The same sets of other embeddings [T, any]."""
        return TokenSets(tokens, self.starts, self.lengths, self.keep, self.longest, self.padded)

    def owners(self) -> Tensor:
        """int64 [T]: the set that each row belongs to. Rows between sets are not told apart."""
        rows = torch.arange(self.tokens.shape[0], device=self.tokens.device)
        return torch.searchsorted(self.starts, rows, right=True) - 1

    def counts(self) -> Tensor:
        """int64 [N]: rows that count."""
        if self.keep is None:
            return self.lengths
        if self.padded is not None:
            return self.keep.view(self.count, self.padded).sum(1)
        before = torch.nn.functional.pad(self.keep.cumsum(0), (1, 0))
        return before[self.starts + self.lengths] - before[self.starts]


def padded_sets(tokens: Tensor, mask: Tensor | None, name: str) -> TokenSets:
    """Sets from embeddings [N, L, D] and a mask bool [N, L], True for tokens that count.

    Raises:
        TypeError: embeddings that are not floating point.
        ValueError: shapes, dtype or device that do not fit.
    """
    check_tokens(tokens, name, 3, "[sets, tokens, features]")
    count, length, width = tokens.shape
    if mask is not None:
        check_mask(mask, tokens, name)
    starts = torch.arange(count, device=tokens.device) * length
    lengths = torch.full_like(starts, length)
    keep = None if mask is None else mask.reshape(-1)
    return TokenSets(tokens.reshape(count * length, width), starts, lengths, keep, length, length)


def packed_sets(tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, name: str) -> TokenSets:
    """Sets from embeddings [T, D] one behind the other and their boundaries [N + 1], from 0 to T.

    Raises:
        TypeError: embeddings that are not floating point.
        ValueError: boundaries that are no ascending integers from 0 to T (on the CPU), or a maximum that is too small.
    """
    check_tokens(tokens, name, 2, "[all tokens, features]")
    cu_seqlens = check_boundaries(cu_seqlens, tokens.shape[0], name)
    if cu_seqlens.device != tokens.device:
        raise ValueError(
            f"cu_seqlens of {name} is on {cu_seqlens.device}, the tokens are on {tokens.device}: move it there"
        )
    lengths = cu_seqlens.diff()
    if max_seqlen is None:
        # Waits for a GPU, as flash-attn's varlen functions do not: those ask for the number.
        max_seqlen = int(lengths.max()) if lengths.numel() else 0
    elif tokens.device.type == "cpu" and lengths.numel() and max_seqlen < int(lengths.max()):
        raise ValueError(f"max_seqlen={max_seqlen} for {name}, whose longest set has {int(lengths.max())} tokens")
    return TokenSets(tokens, cu_seqlens[:-1], lengths, None, max_seqlen, None)


def check_boundaries(cu_seqlens: object, total: int, name: str) -> Tensor:
    """Boundaries of packed sets as int64; on the CPU checked to ascend from 0 to `total`."""
    given = f"cu_seqlens of {name}"
    integers = (torch.int32, torch.int64)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in integers or cu_seqlens.dim() != 1:
        raise ValueError(f"{given} is {described(cu_seqlens)}: expected an int32 or int64 tensor [sets + 1]")
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{given} is empty: expected sets + 1 entries, the first of them 0")
    found = cu_seqlens.to(torch.int64)
    if not torch.compiler.is_compiling() and found.device.type == "cpu":
        bounds = int(found[0]), int(found[-1])
        if bounds != (0, total) or bool((found.diff() < 0).any()):
            raise ValueError(
                f"{given} runs from {bounds[0]} to {bounds[1]}: expected ascending boundaries from 0 to {total}, the "
                "number of tokens"
            )
    return found


def check_mask(mask: object, tokens: Tensor, name: str) -> None:
    """Raise unless the mask is bool [N, L] beside tokens [N, L, D]."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != tokens.shape[:-1]:
        raise ValueError(
            f"the mask of {name} is {described(mask)}: expected a bool tensor of shape {list(tokens.shape[:-1])}, True "
            "for tokens that count (attention_mask.bool())"
        )
    if mask.device != tokens.device:
        raise ValueError(f"the mask of {name} is on {mask.device}, the tokens are on {tokens.device}: move it there")


def check_tokens(tokens: object, name: str, dims: int, expected: str) -> None:
    """Raise unless it is a floating point tensor of so many dimensions."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in FEATURE_DTYPES:
        given = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} is {given}: expected a float16, bfloat16, float32 or float64 tensor")
    if tokens.dim() != dims:
        raise ValueError(f"{name} has shape {list(tokens.shape)}: expected {expected}")


def check_same_space(x: TokenSets, y: TokenSets, x_name: str, y_name: str) -> tuple[TokenSets, TokenSets]:
    """Both of one width, on one device; of two dtypes promoted to one, as torch arithmetic has it."""
    if x.tokens.shape[1] != y.tokens.shape[1]:
        raise ValueError(
            f"{x_name} has {x.tokens.shape[1]} features, {y_name} {y.tokens.shape[1]}: both must be embeddings of one space"
        )
    if x.tokens.device != y.tokens.device:
        raise ValueError(f"{x_name} is on {x.tokens.device}, {y_name} on {y.tokens.device}: move one of them")
    if x.tokens.dtype != y.tokens.dtype:
        common = torch.promote_types(x.tokens.dtype, y.tokens.dtype)
        return x.with_tokens(x.tokens.to(common)), y.with_tokens(y.tokens.to(common))
    return x, y
