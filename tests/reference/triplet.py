"""Triplet hinges (arXiv:1707.05612), and those whose margins follow a peer (arXiv:2404.18114)."""

from __future__ import annotations

import torch
from torch import Tensor


def terms(scores: Tensor, margin: float, mining: str, peer: Tensor | None = None) -> Tensor:
    """[m + (a_ii - a_ij) - (s_ii - s_ij)]_+ of each row: the sum over j != i, or the hardest; `peer` [n, n] is a."""
    peer = torch.zeros_like(scores) if peer is None else peer
    found = []
    for i, (s, a) in enumerate(zip(scores, peer)):
        others = [j for j in range(len(s)) if j != i]
        hinges = torch.clamp(margin + (a[i] - a[others]) - (s[i] - s[others]), min=0)
        found.append(hinges.sum() if mining == "sum" else hinges.max())
    return torch.stack(found)


def absolute_terms(scores: Tensor, margin: float, positive_share: float, peer: Tensor) -> Tensor:
    """[g m + a_ii - s_ii]_+ + max_{j != i} [(1 - g) m + s_ij - a_ij]_+ of each row."""
    found = []
    for i, (s, a) in enumerate(zip(scores, peer)):
        others = [j for j in range(len(s)) if j != i]
        near = torch.clamp(positive_share * margin + a[i] - s[i], min=0)
        far = torch.clamp((1 - positive_share) * margin + s[others] - a[others], min=0)
        found.append(near + far.max())
    return torch.stack(found)
