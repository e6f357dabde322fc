"""Matchings read off the papers, sample by sample and token by token, in float64: the oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Indices = tuple[list[list[int]], list[list[int]], list[list[int]]]


def cosines(metric: Tensor) -> Tensor:
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    found = unit @ unit.transpose(-1, -2)
    return torch.maximum(found, found.transpose(-1, -2))  # a product may add up in another order both ways


def first_best(scores: list[float]) -> int:
    """Position of the largest, the lowest of equal ones."""
    return max(range(len(scores)), key=lambda k: (scores[k], -k))


def by_falling(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda k: (-scores[k], k))


def tome(metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False) -> Indices:
    """arXiv:2210.09461, section 3, and the order of its appendix D: (kept, sources, places) of each sample."""
    kept, sources, places = [], [], []
    tokens = metric.shape[1]
    r = min(r, (tokens - class_token - distill_token) // 2)
    for scores in cosines(metric).tolist():
        if r <= 0:
            kept, sources, places = [*kept, list(range(tokens))], [*sources, []], [*places, []]
            continue
        a, b = list(range(0, tokens, 2)), list(range(1, tokens, 2))
        edges = []
        for i in a:
            row = [-math.inf if distill_token and j == 1 else scores[i][j] for j in b]
            best = first_best(row)
            edges.append((-math.inf if class_token and i == 0 else row[best], best))
        order = by_falling([score for score, _ in edges])
        merged, unmerged = order[:r], order[r:]
        if class_token:
            unmerged = sorted(unmerged)
        of_a, of_b = [a[k] for k in unmerged], b
        new = of_a + of_b if not distill_token else of_a[:1] + of_b[:1] + of_a[1:] + of_b[1:]
        kept.append(new)
        sources.append([a[k] for k in merged])
        places.append([new.index(b[edges[k][1]]) for k in merged])
    return kept, sources, places


def pitome(metric: Tensor, r: int, margin: float, alpha: float = 1.0, protected: int = 0) -> Indices:
    """arXiv:2405.16148, equation 4 and algorithm 1."""
    kept, sources, places = [], [], []
    tokens = metric.shape[1]
    r = min(r, (tokens - protected) // 2)
    for scores in cosines(metric[:, protected:]).tolist():
        gains = [[s - margin if s >= margin else alpha * (math.exp(s - margin) - 1) for s in row] for row in scores]
        order = by_falling([sum(row) / len(row) for row in gains])
        a, b, rest = order[0 : 2 * r : 2], order[1 : 2 * r : 2], order[2 * r :]
        if r <= 0:
            kept, sources, places = [*kept, list(range(tokens))], [*sources, []], [*places, []]
            continue
        new = list(range(protected)) + [protected + k for k in [*rest, *b]]
        kept.append(new)
        sources.append([protected + k for k in a])
        places.append([len(new) - r + first_best([scores[i][j] for j in b]) for i in a])
    return kept, sources, places


def crossget(metric: Tensor, r: int, importance: Tensor, protected: Tensor) -> Indices:
    """arXiv:2305.17455, section 3.3 and algorithm 1."""
    kept, sources, places = [], [], []
    tokens = metric.shape[1]
    r = min(r, (tokens - int(protected.sum(1).max())) // 2)
    for scores, important, barred in zip(
        cosines(metric).tolist(), importance.tolist(), protected.tolist(), strict=True
    ):
        if r <= 0:
            kept, sources, places = [*kept, list(range(tokens))], [*sources, []], [*places, []]
            continue
        allowed = [
            [-math.inf if i == j or barred[i] or barred[j] else scores[i][j] for j in range(tokens)]
            for i in range(tokens)
        ]
        ranked = by_falling([max(row) for row in allowed])
        rank = {token: k for k, token in enumerate(ranked)}
        priority = [
            max([allowed[i][j] for j in range(tokens) if rank[j] > rank[i]], default=-math.inf) - important[i]
            for i in range(tokens)
        ]
        chosen = sorted(by_falling(priority)[:r])
        stay = [i for i in range(tokens) if i not in chosen]
        kept.append(stay)
        sources.append(chosen)
        places.append([first_best([allowed[i][j] for j in stay]) for i in chosen])
    return kept, sources, places
