"""Tokens ranked by a vector: kept, masked or cropped to (GLSim, arXiv:2407.12891; SyCoCa, arXiv:2401.02137)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive.arguments import described
from .checks import check_metric, check_number
from .tome import taken

_SIMILARITIES = ("cosine", "l1", "l2")


class Ranking(NamedTuple):
    """Of the tokens of each sample.

    Attributes:
        scores: [B, N], float32 at least; larger is nearer.
        order: int64 [B, N], positions by falling score, of equal ones the lowest first.
    """

    scores: Tensor
    order: Tensor

    def top(self, k: int) -> Tensor:
        """int64 [B, k]: the positions of the k nearest tokens, in the order of the sequence."""
        check_number("k", k)
        return self.order[:, :k].sort(dim=1).values

    def keep(self, x: Tensor, k: int) -> Tensor:
        """x [B, N, C] -> [B, k, C]: the k nearest tokens, in the order of the sequence; differentiable."""
        return taken(x, self.top(k))

    def mask(self, k: int) -> Tensor:
        """bool [B, N], True for the k nearest tokens."""
        check_number("k", k)
        return torch.zeros_like(self.order, dtype=torch.bool).scatter(1, self.order[:, :k], True)


@torch.no_grad()
def rank_tokens(tokens: Tensor, vector: Tensor, *, similarity: str = "cosine") -> Ranking:
    """Tokens by their similarity to one vector of their sample: its class token (GLSim) or a text's (SyCoCa).

    Args:
        tokens: [B, N, C], patches without class token; no gradient.
        vector: [B, C].
        similarity: "cosine", or "l1" or "l2", the negative distances.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or an unknown similarity.
    """
    check_metric(tokens)
    if vector.shape != (tokens.shape[0], tokens.shape[2]):
        raise ValueError(
            f"vector is {described(vector)}: expected {[tokens.shape[0], tokens.shape[2]]}, one for each sample"
        )
    if similarity not in _SIMILARITIES:
        raise ValueError(f"similarity={similarity!r}: expected " + ", ".join(f'"{each}"' for each in _SIMILARITIES))
    wide = torch.promote_types(tokens.dtype, torch.float32)
    tokens, vector = tokens.to(wide), vector.to(wide).unsqueeze(1)
    if similarity == "cosine":
        scores = F.cosine_similarity(tokens, vector, dim=-1)
    else:
        scores = -torch.linalg.vector_norm(tokens - vector, ord=1 if similarity == "l1" else 2, dim=-1)
    return Ranking(scores, scores.argsort(dim=1, descending=True, stable=True))


def bounding_boxes(index: Tensor, grid: tuple[int, int]) -> Tensor:
    """The smallest box around patches: GLSim's crop, to be cut from the image and seen again at full size.

    Args:
        index: int64 [B, k] of patches of a grid, row by row, k at least 1: `Ranking.top`.
        grid: (rows, columns) of patches.

    Returns:
        int64 [B, 4]: first row, first column, and the row and the column behind the last, in patches.
    """
    rows, columns = index // grid[1], index % grid[1]
    return torch.stack([rows.amin(1), columns.amin(1), rows.amax(1) + 1, columns.amax(1) + 1], 1)
