"""InfoNCE with several positives and the circle loss, term by term over the positives of a row."""

from __future__ import annotations

import torch
from torch import Tensor


def terms(scores: Tensor, same: Tensor, positives: str, denominator: str) -> Tensor:
    """One direction's terms [n] of scores [n, m]; `same` [n, m] are the positives."""
    found = []
    for i in range(len(scores)):
        mine = same[i].nonzero().flatten().tolist()
        if not mine:
            found.append(0 * scores[i].sum())
            continue
        negatives = scores[i][~same[i]]
        if denominator == "mil_nce":
            negatives = torch.cat([negatives, *(scores[:, k][~same[:, k]] for k in mine)])
        if positives == "inside":
            found.append(torch.logsumexp(torch.cat([scores[i, mine], negatives]), 0) - scores[i, mine].logsumexp(0))
            continue
        each = []
        for k in mine:
            kept = [k] if denominator == "others_excluded" else mine
            each.append(torch.logsumexp(torch.cat([scores[i, kept], negatives]), 0) - scores[i, k])
        found.append(sum(each) / (len(each) if positives == "mean" else 1))
    return torch.stack(found)


def circle_terms(cosines: Tensor, same: Tensor, gamma: float, margin: float) -> Tensor:
    """log(1 + sum_n exp(gamma a_n (s_n - m)) sum_p exp(-gamma a_p (s_p - (1 - m)))) of each row."""
    found = []
    for row, mine in zip(cosines, same):
        near, far = row[mine], row[~mine]
        of_near = torch.clamp(1 + margin - near.detach(), min=0)
        of_far = torch.clamp(far.detach() + margin, min=0)
        near_sum = (-gamma * of_near * (near - (1 - margin))).exp().sum()
        far_sum = (gamma * of_far * (far - margin)).exp().sum()
        found.append(torch.log1p(near_sum * far_sum))
    return torch.stack(found)
