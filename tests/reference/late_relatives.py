"""Relatives of MaxSim for one pair of sets a [m, D] and b [n, D], as the papers write them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_maximum(a: Tensor, b: Tensor, temperature: float = 0.07) -> Tensor:
    """CiCo (2303.12793): mean_p sum_r softmax_r(s / T) s."""
    s = a @ b.T
    return ((s / temperature).softmax(1) * s).sum(1).mean()


def log_sum_exp(a: Tensor, b: Tensor, alpha: float = 10.0) -> Tensor:
    """Norton (2401.16702), equation 5 in one direction: mean_p (1 / alpha) log sum_r exp(alpha s)."""
    return ((alpha * (a @ b.T)).exp().sum(1).log() / alpha).mean()


def attention_cosine(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """RadZero (2504.07416), GLSCL (2405.12710): cos(a_p, sum_r softmax_r(<a_p, b_r> / T) b_r), summed."""
    return sum(F.cosine_similarity(each, ((b @ each) / temperature).softmax(0) @ b, dim=0) for each in a)


def weighted_interaction(a: Tensor, b: Tensor, a_weights: Tensor, b_weights: Tensor) -> Tensor:
    """DRL's WTI (2203.07111), Mug-STAN's baseline: weights that sum to one over the tokens, both directions halved."""
    s = a @ b.T
    return ((a_weights * s.max(1).values).sum() + (b_weights * s.max(0).values).sum()) / 2


def mug(a: Tensor, b: Tensor, temperature: float, form: str) -> Tensor:
    """Mug-STAN (2311.15075), with the vectors that the paper pools."""
    s = a @ b.T
    frames_of_words, words_of_frames = (s / temperature).softmax(1) @ b, (s / temperature).softmax(0).T @ a
    to_video, to_text = (frames_of_words * a).sum(1), (words_of_frames * b).sum(1)
    u, v = (to_video / temperature).softmax(0), (to_text / temperature).softmax(0)
    return (u @ a) @ (v @ b) if form == "full" else ((u * to_video).sum() + (v * to_text).sum()) / 2


def conditioned(text: Tensor, query: Tensor, contexts: list[tuple[Tensor, Tensor]], temperature: float) -> Tensor:
    """X-Pool (2203.15086), TEFAL (2307.12964): the text against the sum of what it attends to in each modality."""
    vector = sum((keys @ query / temperature).softmax(0) @ values for keys, values in contexts)
    return (text * vector).sum() / (text.norm() * vector.norm())


def sinkhorn(a: Tensor, b: Tensor, epsilon: float, iterations: int, dustbin: Tensor | None, *, hold: bool) -> Tensor:
    """Norton (2401.16702) by Sinkhorn's products; `hold`: no gradient of the plan."""
    s = a @ b.T
    m, n = s.shape
    logits = s
    rows, cols = s.new_full((m,), 1 / m), s.new_full((n,), 1 / n)
    if dustbin is not None:
        logits = torch.cat([torch.cat([s, dustbin.expand(m, 1)], 1), dustbin.expand(1, n + 1)])
        rows = torch.cat([s.new_ones(m), s.new_full((1,), n)]) / (m + n)
        cols = torch.cat([s.new_ones(n), s.new_full((1,), m)]) / (m + n)
    kernel = (logits / epsilon).exp()
    v = torch.ones_like(cols)
    for _ in range(iterations):
        u = rows / (kernel @ v)
        v = cols / (kernel.T @ u)
    plan = (u[:, None] * kernel * v)[:m, :n]
    plan = plan / plan.sum()
    return ((plan.detach() if hold else plan) * s).sum()


def ipot(a: Tensor, b: Tensor, beta: float, iterations: int) -> Tensor:
    """Algorithm 1 of 1802.04307 with one inner step, masses 1 / m and 1 / n; T is held, as in UNITER (1909.11740)."""
    cost = 1 - a @ b.T
    m, n = cost.shape
    kernel = (-cost.detach() / beta).exp()
    transport, sigma = torch.ones_like(kernel), cost.new_full((m,), 1 / m)
    for _ in range(iterations):
        step = kernel * transport
        delta = 1 / (n * (step.T @ sigma))
        sigma = 1 / (m * (step @ delta))
        transport = sigma[:, None] * step * delta
    return (transport * cost).sum()


def soft_dtw(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """1703.01541, entry by entry."""
    cost = 1 - a @ b.T
    reached: dict[tuple[int, int], Tensor] = {}
    for p, r in itertools.product(range(len(a)), range(len(b))):
        before = [reached[at] for at in ((p - 1, r - 1), (p - 1, r), (p, r - 1)) if at in reached]
        enter = -gamma * (-torch.stack(before) / gamma).logsumexp(0) if before else 0
        reached[p, r] = cost[p, r] + enter
    return reached[len(a) - 1, len(b) - 1]


def bipartite(a: Tensor, b: Tensor) -> Tensor:
    """LightCLIP (2312.00674): the best of all one-to-one matchings, by trying them."""
    s = a @ b.T if len(a) <= len(b) else b @ a.T
    rows = range(len(s))
    totals = [s[rows, list(chosen)].mean() for chosen in itertools.permutations(range(s.shape[1]), len(s))]
    return torch.stack(totals).max()


def sparsemax(scores: Tensor) -> Tensor:
    """Algorithm 1 of 1602.02068, of a vector."""
    ordered = scores.sort(descending=True).values
    size = max(k for k in range(1, len(scores) + 1) if 1 + k * ordered[k - 1] > ordered[:k].sum())
    return (scores - (ordered[:size].sum() - 1) / size).clamp(min=0)
