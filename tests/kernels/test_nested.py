"""Cross-entropies of nested widths: one sweep or several, against float64, value and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pairtile.kernels import use_backend
from pairtile.kernels.contrastive.nested import nested_cross_entropy_sum

# (N, M, D, widths, offset, row weight, column weight, normalize): odd sizes, several tiles, a tail of features that no
# width has, pairs outside S, one row, one direction.
CASES = [
    (37, 37, 19, (3, 8, 19), 0, 0.5, 0.5, True),
    (300, 530, 70, (16, 64, 70), 3, 1.0, 0.0, True),
    (130, 131, 33, (5, 6, 30), 0, 0.3, 0.7, False),
    (140, 280, 96, (32, 96), -20, 0.5, 0.7, True),
    (1, 1, 4, (2, 4), 0, 0.5, 0.5, True),
]


def inputs(n: int, m: int, d: int, normalize: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(n, d), torch.randn(m, d)
    pairs = min(n, m)
    y[:pairs] += x[:pairs]
    if not normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    if pairs > 2:
        y[1], x[2, :8] = y[0], 0  # a tie, and prefixes of length 0
    return [x, y, torch.tensor(14.3)]


def outcome(leaves, dtype, **request):
    x, y, scale = (each.to(dtype).requires_grad_() for each in leaves)
    value = nested_cross_entropy_sum(x, y, scale=scale, **request)
    return [value.detach(), *torch.autograd.grad(value, (x, y, scale))]


@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_float32_allows(backend, case):
    n, m, d, widths, offset, row_weight, col_weight, normalize = case
    if backend == "reference":
        pytest.skip("the truth itself")
    if backend == "triton" and n * m > 2000:
        pytest.skip("the same sums as with few rows, slowly")
    request = {
        "widths": widths,
        "weights": [0.3, 1.0, 0.7][: len(widths)],
        "normalize": normalize,
        "offset": offset,
        "row_weight": row_weight / n,
        "col_weight": col_weight / n,
    }
    leaves = inputs(n, m, d, normalize)
    found = outcome(leaves, torch.float32, **request)
    with use_backend("reference"):
        truth = outcome(leaves, torch.float64, **request)
    names = ("value", "dx", "dy", "dscale")
    # triton multiplies the scale by log2(e) before the cosines: one rounding that moves all scores of a row alike.
    bound = 5e-6 if backend == "triton" else 2e-6
    for name, given, right in zip(names, found, truth, strict=True):
        size = max(float(right.norm()), 1e-3)  # a batch of one has no gradient
        assert float((given.double() - right).norm()) <= bound * size, name


def test_threads_and_budget(cpp):
    """The bits depend on neither the threads nor, in what is kept, the budget."""
    leaves, request = inputs(300, 300, 40, True), {"widths": (8, 40), "weights": (1.0, 1.0), "row_weight": 1.0}
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads, budget in ((1, None), (3, None), (2, 16 << 20)):
            torch.set_num_threads(threads)
            outcomes.append(outcome(leaves, torch.float32, col_weight=1.0, memory_budget=budget, **request))
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_twice_and_not_twice(cpp):
    """A graph that is kept gives the same gradient again; a second derivative is refused."""
    x, y, scale = (each.requires_grad_() for each in inputs(40, 40, 8, True))
    value = nested_cross_entropy_sum(x, y, scale=scale, widths=(4, 8), weights=(1, 1), col_weight=1.0)
    first, again = (torch.autograd.grad(value, (x, y, scale), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()


@pytest.mark.parametrize("widths", [(), (4, 4), (8, 4), (4, 9), (0, 4)])
def test_widths_that_make_no_sense(widths):
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="expected ascending numbers from 1 to 8"):
        nested_cross_entropy_sum(x, x, scale=1.0, widths=widths, weights=[1.0] * len(widths))


def test_a_prefix_shorter_than_eps_is_clamped(backend):
    """As F.normalize has it: its length counts as 1e-12, and has no gradient."""
    x = torch.zeros(2, 4)
    x[0, 0], x[1, :2] = 1, torch.tensor([8e-13, 1e-13])
    leaves = [x, torch.eye(4)[:2].contiguous(), torch.tensor(20.0)]
    request = {"widths": (2,), "weights": (1.0,), "row_weight": 0.5, "col_weight": 0.5}
    found = outcome(leaves, torch.float32, **request)
    with use_backend("reference"):
        truth = outcome(leaves, torch.float64, **request)
    for given, right in zip(found[:3], truth[:3], strict=True):
        torch.testing.assert_close(given.double(), right, rtol=1e-5, atol=1e-6)
