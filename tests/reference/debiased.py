"""The debiased contrastive loss (arXiv:2007.00224) with the hardness of arXiv:2010.04592, as the papers write it."""

from __future__ import annotations

import torch
from torch import Tensor


def terms(scores: Tensor, scale: Tensor, tau_plus: float, beta: float) -> Tensor:
    """-log(e^{S_ii} / (e^{S_ii} + N g_i)) of each row of scores [n, n]."""
    found = []
    for i in range(len(scores)):
        negatives = torch.cat([scores[i, :i], scores[i, i + 1 :]])
        positive = scores[i, i].exp()
        if not len(negatives):
            found.append(0 * positive)
            continue
        importance = (beta * negatives).exp()
        importance = importance / importance.mean()
        g = ((importance * negatives.exp()).mean() - tau_plus * positive) / (1 - tau_plus)
        g = torch.maximum(g, torch.exp(-scale))
        found.append(torch.log(positive + len(negatives) * g) - scores[i, i])
    return torch.stack(found)
