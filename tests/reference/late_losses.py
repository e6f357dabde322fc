"""Losses over token sets, pair by pair as the papers write them: FILIP (2111.07783), ColBERT (2004.12832), ColPali (2407.01449)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_scores(x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, *, mean: bool) -> Tensor:
    """[N, M]: sum (or mean) over the tokens of x_i of the largest product with a token of y_j. No set is empty."""
    rows = []
    for a, of_a in zip(x, x_mask):
        terms = [(a[of_a] @ b[of_b].T).max(1).values for b, of_b in zip(y, y_mask)]
        rows.append(torch.stack([each.mean() if mean else each.sum() for each in terms]))
    return torch.stack(rows)


def softplus(value: Tensor) -> Tensor:
    """log(1 + exp(value)), without F.softplus's threshold."""
    return torch.logaddexp(value, torch.zeros_like(value))


def row_terms(scores: Tensor, extra: list[Tensor] | None = None, *, hardest: bool = False) -> Tensor:
    """softplus(LSE (or maximum) over the others - own) of each row of [n, n], with further scores of each row's own."""
    terms = []
    for i, row in enumerate(scores):
        others = torch.cat([row[:i], row[i + 1 :], *([extra[i]] if extra else [])])
        if len(others):
            terms.append(softplus((others.max() if hardest else others.logsumexp(0)) - row[i]))
        else:
            terms.append(0 * row[i])
    return torch.stack(terms)


def pairwise(own: Tensor, negatives: list[Tensor]) -> Tensor:
    return torch.stack([softplus(each - mine).mean() for mine, each in zip(own, negatives)])


def distillation(scores: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / T) || softmax(scores / T)) of each row."""
    target = (teacher / temperature).softmax(1)
    return (target * (target.log() - F.log_softmax(scores / temperature, 1))).sum(1)


def margin_mse(scores: Tensor, teacher: Tensor) -> Tensor:
    """mean_k ((s_0 - s_k) - (t_0 - t_k))^2 over k > 0 of each row (2010.02666)."""
    given, wanted = scores[:, :1] - scores[:, 1:], teacher[:, :1] - teacher[:, 1:]
    return (given - wanted).square().mean(1)
