"""Optimal transport between the tokens of two sets, in the log domain, for all pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .formulas import Block, formula
from .pair_formulas import check_positive, counted, either_empty, pair_scores, replaced


def sinkhorn_similarity(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    epsilon: float = 0.1,
    iterations: int = 50,
    dustbin: float | Tensor | None = None,
    through_plan: bool = False,
    memory_budget: int | None = None,
) -> Tensor:
    """Mean similarity of tokens under the entropic transport plan between two sets (Norton, arXiv:2401.16702).

    With s_pr = <x_ip, y_jr>, the plan Q maximises <Q, s> + epsilon H(Q) among those whose rows sum to 1 / m and whose columns
    sum to 1 / n, found by Sinkhorn's iterations; the score is <Q, s> / sum Q.

    With a dustbin (Norton's alignable prompt bucket) the matrix gains a row and a column of that similarity, which may take
    what fits nothing: tokens have mass 1 / (m + n), the two bins n / (m + n) and m / (m + n), and the score is that of the
    tokens' part of the plan, whose mass is normalised, as the authors' code does.

    Args:
        x: [N, Lx, D], clips, say.
        y: [M, Ly, D], captions; or [N, K, Ly, D], K candidates of each x.
        x_mask, y_mask: bool, of the tokens' shapes without D, True for tokens that count; None: all.
        epsilon: above 0, in units of similarity.
        iterations: of rows and columns each, at least 1. The columns' sums are exact, those of rows approach theirs.
        dustbin: a similarity, a number or a tensor of shape [] or [1]; None: every token has to go somewhere.
        through_plan: also differentiate the plan, through all iterations, in time and memory of each (and the dustbin);
            otherwise the gradient is that of <Q, s> with Q held, as the authors have it.
        memory_budget: bytes for a block of pairs and what its backward keeps.

    Returns:
        [N, M] or [N, K], float32 (float64 for float64 tokens). -inf for an empty y, else 0 for an empty x, without gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, masks or devices that do not fit, or options out of their range.
    """
    check_positive(epsilon=epsilon)
    _check_iterations(iterations)
    shared = []
    if dustbin is not None:
        if isinstance(dustbin, Tensor) and dustbin.shape not in ((), (1,)):
            raise ValueError(
                f"dustbin has shape {list(dustbin.shape)}: expected a number, or a tensor of shape [] or [1]"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        shared = [torch.as_tensor(dustbin, device=x.device).to(dtype).reshape(())]
    copies = 8 + (4 * iterations if through_plan else 0)
    numbers = epsilon, iterations, through_plan
    return pair_scores(
        *("sinkhorn", x, y, x_mask, y_mask), numbers=numbers, shared=shared, copies=copies, memory_budget=memory_budget
    )


def ipot_distance(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    memory_budget: int | None = None,
) -> Tensor:
    """<T, C>, C_pr = 1 - <x_ip, y_jr>, T the transport plan found by proximal points: UNITER's word-region alignment (arXiv:1909.11740).

    T starts as all ones; each of the iterations of IPOT (arXiv:1802.04307) is one Sinkhorn step on T * exp(-C / beta), so
    that T approaches the exact plan between uniform masses 1 / m and 1 / n, not a smoothed one. The gradient is that of
    <T, C> with T held, as in UNITER.

    Args:
        x: [N, Lx, D], regions, unit vectors where 1 - <., .> is to be the cosine distance.
        y: [M, Ly, D], words; or [N, K, Ly, D], K candidates of each x (UNITER has K = 1: its own caption, or another).
        x_mask, y_mask: bool, of the tokens' shapes without D, True for tokens that count; None: all.
        beta: above 0, the proximal step.
        iterations: at least 1.
        memory_budget: bytes for a block of pairs and what its backward keeps.

    Returns:
        Distances [N, M] or [N, K], float32 (float64 for float64 tokens); inf where either set is empty, without gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, masks or devices that do not fit, or options out of their range.
    """
    check_positive(beta=beta)
    _check_iterations(iterations)
    numbers = beta, iterations
    return pair_scores("ipot", x, y, x_mask, y_mask, numbers=numbers, copies=10, memory_budget=memory_budget)


def _check_iterations(iterations: int) -> None:
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations={iterations!r}: expected a whole number of at least 1")


@formula
def sinkhorn(block: Block, numbers: Sequence[float], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Numbers: epsilon, iterations, whether the plan is differentiated. Shared: a dustbin, or nothing."""
    epsilon, iterations, through_plan = numbers[0], int(numbers[1]), bool(numbers[2])
    similarity = block.similarity
    if not similarity.shape[2] or not similarity.shape[3]:
        return (replaced(similarity.sum((2, 3)), block),)
    of_x, of_y = counted(block)
    with torch.set_grad_enabled(through_plan and torch.is_grad_enabled()):
        logits = similarity / epsilon
        if shared:
            plan = _with_dustbin(logits, of_x, of_y, shared[0] / epsilon, iterations)
        else:
            masses = -of_x.sum(-1, keepdim=True).log(), -of_y.sum(-1, keepdim=True).log()
            plan = _plan(logits, of_x, of_y, masses[0].to(logits), masses[1].to(logits), iterations)
        plan = plan.masked_fill(~(of_x.unsqueeze(-1) & of_y.unsqueeze(-2)), 0)
        plan = plan / plan.sum((2, 3), keepdim=True)
    return (replaced((plan * similarity).sum((2, 3)), block),)


def _with_dustbin(logits: Tensor, of_x: Tensor, of_y: Tensor, dustbin: Tensor, iterations: int) -> Tensor:
    n, m, lx, ly = logits.shape
    bins = dustbin.expand(n, m, lx, 1), dustbin.expand(n, m, 1, ly + 1)
    extended = torch.cat([torch.cat([logits, bins[0]], 3), bins[1]], 2)
    count_x, count_y = of_x.sum(-1, keepdim=True), of_y.sum(-1, keepdim=True)
    total = (count_x + count_y).to(logits).log()  # [n, m, 1]
    of_rows, of_cols = (torch.nn.functional.pad(each, (0, 1), value=True) for each in (of_x, of_y))
    rows = torch.cat([(-total).expand(n, m, lx), count_y.to(logits).log() - total], 2)
    cols = torch.cat([(-total).expand(n, m, ly), count_x.to(logits).log() - total], 2)
    return _plan(extended, of_rows, of_cols, rows, cols, iterations)[:, :, :lx, :ly]


def _plan(
    logits: Tensor, of_rows: Tensor, of_cols: Tensor, row_mass: Tensor, col_mass: Tensor, iterations: int
) -> Tensor:
    """exp(logits + u + v) after Sinkhorn's iterations towards log masses [n, m, R] and [n, m, C].

    Rows and columns that do not count have numbers too, which nothing reads.
    """
    by_row = logits.masked_fill(~of_cols.unsqueeze(-2), -torch.inf)
    by_col = logits.masked_fill(~of_rows.unsqueeze(-1), -torch.inf)
    v = torch.zeros_like(logits[:, :, 0])
    u = v.new_zeros(logits.shape[:3])
    for _ in range(iterations):
        u = row_mass - (by_row + v.unsqueeze(-2)).logsumexp(-1)
        v = col_mass - (by_col + u.unsqueeze(-1)).logsumexp(-2)
    return (logits + u.unsqueeze(-1) + v.unsqueeze(-2)).exp()


@formula
def ipot(block: Block, numbers: Sequence[float], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Numbers: beta, iterations."""
    beta, iterations = numbers[0], int(numbers[1])
    cost = 1 - block.similarity
    if not cost.shape[2] or not cost.shape[3]:
        return (cost.sum((2, 3)) + math.inf,)
    of_x, of_y = counted(block)
    allowed = of_x.unsqueeze(-1) & of_y.unsqueeze(-2)
    with torch.no_grad():
        kernel = (-cost / beta).masked_fill(~allowed, -torch.inf)
        log_m, log_n = (mask.sum(-1, keepdim=True).to(cost).log() for mask in (of_x, of_y))
        # The authors' order: masses of y from those of x, then those of x from y's; exponents of what does not count are 0.
        transport, sigma = kernel.new_zeros(kernel.shape), (-log_m).expand(cost.shape[:3])
        for _ in range(iterations):
            step = kernel + transport
            delta = (-log_n - (step + sigma.unsqueeze(-1)).logsumexp(-2)).masked_fill(~of_y, 0)
            sigma = (-log_m - (step + delta.unsqueeze(-2)).logsumexp(-1)).masked_fill(~of_x, 0)
            transport = (step + delta.unsqueeze(-2) + sigma.unsqueeze(-1)).masked_fill(~allowed, 0)
        plan = transport.exp().masked_fill(~allowed, 0)
    return ((plan * cost).sum((2, 3)).masked_fill(either_empty(block), torch.inf),)
