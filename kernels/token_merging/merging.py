"""`merge` and `unmerge` of a matching, with ToMe's signatures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contrastive.arguments import described
from .combine import average, combine, spread
from .matching import Matching

_MODES = ("mean", "sum", "amax")


@dataclass(frozen=True, eq=False)
class Merge:
    """Merges tokens: `merge(x, mode="mean")`, x [B, N, C] -> [B, S, C], differentiable.

    "mean" and "sum" are over the tokens of a place, "amax" their largest entries, whose gradient goes to the first of equals.

    Attributes:
        matching: which tokens go where.
    """

    matching: Matching

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        matching = self.matching
        if mode not in _MODES:
            raise ValueError(f"mode={mode!r}: expected " + ", ".join(f'"{each}"' for each in _MODES))
        check_tokens(x, matching.tokens, "x")
        if not matching.sources.shape[1]:
            return x
        if mode == "amax":
            return _largest(x, matching)
        return average(x, matching, None, None)[0] if mode == "mean" else combine(x, matching, None, None)


@dataclass(frozen=True, eq=False)
class Unmerge:
    """Gives every token what its place holds: `unmerge(x)`, x [B, S, C] -> [B, N, C], differentiable.

    Attributes:
        matching: which tokens went where.
    """

    matching: Matching

    def __call__(self, x: Tensor) -> Tensor:
        check_tokens(x, self.matching.kept.shape[1], "x")
        return spread(x, self.matching) if self.matching.sources.shape[1] else x


def merge_tokens(x: Tensor, matching: Matching, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average of merged tokens weighted by how many original tokens each stands for, and the new sizes.

    out_s = sum_t w_t size_t x_t / sum_t size_t over the tokens of place s; w is 1 unless the matching has weights.

    Args:
        x: [B, N, C], differentiable.
        matching: which tokens go where.
        size: [B, N, 1], or None where each token stands for itself.

    Returns:
        (tokens [B, S, C] in the dtype of x, sizes [B, S, 1] in float32).
    """
    check_tokens(x, matching.tokens, "x")
    sizes = None
    if size is not None:
        if size.shape != (*x.shape[:2], 1):
            raise ValueError(f"size is {described(size)}: expected {[*x.shape[:2], 1]}, a number for each token")
        sizes = size.detach().squeeze(-1).to(torch.float32)
    if not matching.sources.shape[1]:
        sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device) if sizes is None else sizes
        return x, sizes.unsqueeze(-1)
    factors = sizes
    if matching.weights is not None:
        factors = matching.weights if sizes is None else sizes * matching.weights
    tokens, merged = average(x, matching, factors, sizes)
    return tokens, merged.unsqueeze(-1)


def merge_wavg(merge: Callable[..., Tensor], x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As in ToMe: `merge_tokens` by what a matching function returned first.

    Args:
        merge: of `bipartite_soft_matching` and its kin.
        x: [B, N, C].
        size: [B, N, 1] or None.

    Returns:
        (tokens [B, S, C], sizes [B, S, 1]).
    """
    if isinstance(merge, Merge):
        return merge_tokens(x, merge.matching, size)
    size = torch.ones_like(x[..., :1]) if size is None else size
    merged, sizes = merge(x * size, mode="sum"), merge(size, mode="sum")
    return merged / sizes, sizes


def merge_source(merge: Callable[..., Tensor], x: Tensor, source: Tensor | None = None) -> Tensor:
    """As in ToMe: which original tokens each token of x, once merged, stands for, [B, S, N0] of zeros and ones.

    Args:
        merge: of `bipartite_soft_matching` and its kin.
        x: [B, N, C]; only its shape counts, where `source` is None.
        source: [B, N, N0] of the tokens before this merge.
    """
    if source is None:
        batch, tokens, _ = x.shape
        source = torch.eye(tokens, device=x.device).expand(batch, -1, -1)
    return merge(source, mode="amax")


def check_tokens(x: object, tokens: int, name: str) -> None:
    """Raise unless x is [B, tokens, C]."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] != tokens:
        raise ValueError(
            f"{name} is {described(x)}: expected [batch, {tokens}, channels], the tokens that were matched"
        )


def _largest(x: Tensor, matching: Matching) -> Tensor:
    """By the index of the token that holds the largest entry of each place, channel by channel."""
    width = x.shape[-1]
    kept, sources, places = (
        each.unsqueeze(-1).expand(-1, -1, width) for each in (matching.kept, matching.sources, matching.places)
    )
    with torch.no_grad():
        best = x.gather(1, kept).scatter_reduce(1, places, x.gather(1, sources), "amax")
        # Of the tokens of a place that reach its maximum the first: all others are no candidates.
        reached = x == best.gather(1, matching.place_of().unsqueeze(-1).expand(-1, -1, width))
        at = torch.arange(x.shape[1], device=x.device)[None, :, None]
        candidates = at.where(reached, x.shape[1])
        chosen = candidates.gather(1, kept).scatter_reduce(1, places, candidates.gather(1, sources), "amin")
    return x.gather(1, chosen.clamp(max=x.shape[1] - 1))
