"""Late interaction against float64, on random cases: no worse than dense float32 PyTorch; and ties as the reference has them."""

from __future__ import annotations

import pytest
import torch
from contenders import BOUNDS, contenders, portable_product, relative_error
from late_cases import Case, integer_case, outcome, random_case

from pairtile.kernels import use_backend

CASES = 200
#: As many of them run in Triton's interpreter, which takes a tenth of a second for each.
TRITON_CASES = 40
FAMILIES = ["maxsim", "filip", "soft", "project"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(CASES))
def test_no_worse_than_dense_float32(family, seed):
    case = random_case(family, seed)
    with use_backend("reference"):
        truth = outcome(case, case.to(torch.float64))
        dense = outcome(case, case.to(torch.float32))
    for backend, portable in contenders(seed < TRITON_CASES):
        with use_backend(backend), portable_product(portable):
            found = outcome(case, case.operands)
        for name, value in found.items():
            floor, factor = BOUNDS[backend]
            size = case.sizes.get(name, 0.0)
            allowed = max(floor, factor * relative_error(dense[name], truth[name], size), rounding(case, family, name))
            error = relative_error(value, truth[name], size)
            assert error <= allowed, f"{backend}{' portable' * portable}: {name} {error:.2g} > {allowed:.2g}"


def rounding(case: Case, family: str, name: str) -> float:
    """What 16-bit operands cost: the gradient is rounded once; weights of a softmax are rounded before they multiply."""
    if case.dtype == torch.float32 or not name.startswith("d"):
        return 0.0
    eps = torch.finfo(case.dtype).eps
    return 3 * eps if family == "soft" else eps / 2


@pytest.mark.parametrize("family", ["maxsim", "filip", "project"])
@pytest.mark.parametrize("seed", range(30))
def test_equal_maxima_choose_the_first(family, seed):
    case = integer_case(family, seed)
    with use_backend("reference"):
        truth = outcome(case, case.to(torch.float64))
    for backend, portable in contenders(seed < 10):
        with use_backend(backend), portable_product(portable):
            found = outcome(case, case.operands)
        for name, value in found.items():
            # The choice is exact; upstream gradients are not, and are rounded with the sums of their products.
            allowed = 2e-6 if case.dtype == torch.float32 or not name.startswith("d") else torch.finfo(case.dtype).eps
            assert relative_error(value, truth[name], 0.0) <= allowed, f"{backend} {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_give_the_same_bits(backend, family):
    for seed in range(400, 403 if backend == "triton" else 410):
        case = random_case(family, seed)
        first, second = (outcome(case, case.operands) for _ in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
