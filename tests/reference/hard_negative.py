"""Cross-entropy against the hardest negatives (arXiv:2504.17432), and against a row's own ones."""

from __future__ import annotations

import torch
from torch import Tensor


def terms(
    scores: Tensor, scale: Tensor, k: int | None, threshold: float | None, private: Tensor | None = None
) -> Tensor:
    """One direction's terms [n] of scores [n, n or more], row i's positive in column i; `private` [n, K]."""
    found = []
    for i, row in enumerate(scores):
        candidates = [j for j in range(len(row)) if j != i]
        if threshold is not None:
            candidates = [j for j in candidates if row[j] <= row[i] + threshold * scale]
        candidates.sort(key=lambda j: -row[j].item())
        kept = row[[i, *candidates[:k]]]
        kept = kept if private is None else torch.cat([kept, private[i]])
        found.append(torch.logsumexp(kept, 0) - row[i])
    return torch.stack(found)
