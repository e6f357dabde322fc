"""Losses over pairs and ids as one writes them in PyTorch: logits, masks, one product where one does.

What ours are measured against, eagerly and under torch.compile. Both directions count 0.5, as in ours by default.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def siglip_plus(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor
) -> Tensor:
    """`SigLipPlusLoss`."""
    logits = scale * images @ texts.T + bias
    positive = image_ids[:, None] == text_ids
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / len(images)


def decoupled(
    images: Tensor, texts: Tensor, scale: Tensor, weighted: bool = False, sigma: float = 0.5, intra: bool = False
) -> Tensor:
    """`DecoupledContrastiveLoss`."""
    logits = scale * images @ texts.T
    positive = logits.diagonal()
    diagonal = torch.eye(len(images), dtype=torch.bool, device=images.device)
    rows, cols = logits, logits.T
    if intra:
        rows = torch.cat([rows, scale * images @ images.T], 1)
        cols = torch.cat([cols, scale * texts @ texts.T], 1)
        diagonal = diagonal.repeat(1, 2)
    if weighted:
        positive = positive * (2 - len(images) * ((images * texts).sum(1) / sigma).softmax(0))
    negative = rows.masked_fill(diagonal, -torch.inf).logsumexp(1) + cols.masked_fill(diagonal, -torch.inf).logsumexp(1)
    return (negative / 2 - positive).mean()


def multi_positive(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    positives: str = "mean",
    denominator: str = "all",
) -> Tensor:
    """`MultiPositiveLoss`, where every row and every column has a positive."""
    logits = scale * images @ texts.T
    same = image_ids[:, None] == text_ids
    if denominator == "mil_nce":
        return _mil_nce(logits, same, positives)
    return (
        _one_direction(logits, same, positives, denominator) + _one_direction(logits.T, same.T, positives, denominator)
    ) / 2


def _one_direction(logits: Tensor, same: Tensor, positives: str, denominator: str) -> Tensor:
    weights = same.to(logits.dtype)
    if positives == "mean":
        weights = weights / weights.sum(1, keepdim=True)
    if denominator == "others_excluded":
        negatives = logits.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
        return (weights * F.softplus(negatives - logits)).sum(1).mean()
    if positives == "mean":
        return F.cross_entropy(logits, weights)
    if positives == "sum":
        return -(weights * logits.log_softmax(1)).sum(1).mean()
    return (logits.logsumexp(1) - logits.masked_fill(~same, -torch.inf).logsumexp(1)).mean()


def _mil_nce(logits: Tensor, same: Tensor, positives: str) -> Tensor:
    negatives = logits.masked_fill(same, -torch.inf)
    of_rows, of_cols = negatives.logsumexp(1), negatives.logsumexp(0)
    total = 0.0
    for scores, mine, own, others in ((logits, same, of_rows, of_cols), (logits.T, same.T, of_cols, of_rows)):
        inside = scores.masked_fill(~mine, -torch.inf).logsumexp(1)
        beside = others.expand_as(scores).masked_fill(~mine, -torch.inf).logsumexp(1)
        log_all = torch.stack([inside, own, beside]).logsumexp(0)
        if positives == "inside":
            total = total + (log_all - inside).mean() / 2
            continue
        weights = mine.to(scores.dtype)
        sums, counts = (weights * scores).sum(1), weights.sum(1)
        terms = log_all - sums / counts if positives == "mean" else counts * log_all - sums
        total = total + terms.mean() / 2
    return total


def circle(
    images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor, gamma: float = 32.0, margin: float = 0.25
) -> Tensor:
    """`CircleLoss`."""
    cosines = images @ texts.T
    same = image_ids[:, None] == text_ids
    fixed = cosines.detach()
    near = (-gamma * F.relu(1 + margin - fixed) * (cosines - (1 - margin))).masked_fill(~same, -torch.inf)
    far = (gamma * F.relu(fixed + margin) * (cosines - margin)).masked_fill(same, -torch.inf)
    rows, cols = (F.softplus(near.logsumexp(dim) + far.logsumexp(dim)).mean() for dim in (1, 0))
    return (rows + cols) / 2


def debiased(images: Tensor, texts: Tensor, scale: Tensor, tau_plus: float = 0.1, beta: float = 0.0) -> Tensor:
    """`DebiasedContrastiveLoss`, with exponentials as the papers' code has them: up to a scale of some 80."""
    n = len(images)
    logits = scale * images @ texts.T
    positive = logits.diagonal().exp()
    diagonal = torch.eye(n, dtype=torch.bool, device=images.device)
    total = 0.0
    for scores in (logits, logits.T):
        negatives = scores.exp().masked_fill(diagonal, 0)
        if beta:
            importance = (beta * scores).exp().masked_fill(diagonal, 0)
            mean = (importance * negatives).sum(1) / importance.sum(1)
        else:
            mean = negatives.sum(1) / (n - 1)
        g = torch.maximum((mean - tau_plus * positive) / (1 - tau_plus), torch.exp(-scale))
        total = total - torch.log(positive / (positive + (n - 1) * g)).mean() / 2
    return total


def hard_negatives(
    images: Tensor, texts: Tensor, scale: Tensor, k: int | None = 8, threshold: float | None = 0.1
) -> Tensor:
    """`HardNegativeLoss`."""
    n = len(images)
    logits = scale * images @ texts.T
    own = logits.diagonal()[:, None]
    diagonal = torch.eye(n, dtype=torch.bool, device=images.device)
    labels = torch.zeros(n, dtype=torch.long, device=images.device)
    total = 0.0
    for scores in (logits, logits.T):
        dropped = diagonal if threshold is None else diagonal | (scores > own + threshold * scale)
        negatives = scores.masked_fill(dropped, -torch.inf)
        if k is not None:
            negatives = negatives.topk(min(k, n)).values
        total = total + F.cross_entropy(torch.cat([own, negatives], 1), labels) / 2
    return total


def triplet(images: Tensor, texts: Tensor, scale: Tensor, margin: float = 0.2, mining: str = "sum") -> Tensor:
    """`TripletLoss` without a peer."""
    scores = scale * images @ texts.T
    return _hinges(scores, margin, mining)


def triplet_with_peer(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    peer_images: Tensor,
    peer_texts: Tensor,
    margin: float = 0.2,
    form: str = "relative",
    positive_share: float = 0.5,
) -> Tensor:
    """`TripletLoss(mining="hardest")` with a peer."""
    ahead = scale * (images @ texts.T - (peer_images @ peer_texts.T).detach())
    if form == "relative":
        return _hinges(ahead, margin, "hardest")
    near = F.relu(positive_share * margin - ahead.diagonal()).mean()
    far = F.relu((1 - positive_share) * margin + ahead).masked_fill(
        torch.eye(len(images), dtype=torch.bool, device=images.device), 0
    )
    return near + (far.amax(1).mean() + far.amax(0).mean()) / 2


def _hinges(scores: Tensor, margin: float, mining: str) -> Tensor:
    own = scores.diagonal()
    diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    rows = F.relu(margin + scores - own[:, None]).masked_fill(diagonal, 0)
    cols = F.relu(margin + scores - own).masked_fill(diagonal, 0)
    if mining == "sum":
        return (rows.sum(1).mean() + cols.sum(0).mean()) / 2
    return (rows.amax(1).mean() + cols.amax(0).mean()) / 2
