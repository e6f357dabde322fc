"""Results and every gradient against float64, on random cases: no worse than dense float32 PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from contenders import BOUNDS, contenders, portable_product, relative_error
from torch import Tensor

from pairtile.kernels import (
    Diagonal,
    HingeSum,
    LogSumExp,
    Max,
    PairScore,
    SameId,
    SoftmaxMean,
    SoftplusSum,
    Teacher,
    TopK,
    similarity_reduce,
    use_backend,
)
from similarity_cases import (
    Case,
    cancelling_sizes,
    outcome,
    pair_gradients,
    random_case,
    random_features,
    random_upstream,
)

CASES = 320
#: As many of them run in Triton's interpreter, which takes a tenth of a second for each.
TRITON_CASES = 200
#: The same of the cases with every reduction.
RICHER_CASES, RICHER_TRITON_CASES = 120, 60


# ---- dense PyTorch -------------------------------------------------------------------------------


def dense_errors(case: Case, truth: dict[str, Tensor], sizes: dict[str, float]) -> dict[str, float]:
    """What dense float32 PyTorch does to the same inputs."""
    with use_backend("reference"):
        found = outcome(case, case.to(torch.float32))
    return {name: relative_error(value, truth[name], sizes.get(name, 0.0)) for name, value in found.items()}


def dense_16_bit_errors(case: Case, truth: dict[str, Tensor], sizes: dict[str, float]) -> dict[str, float]:
    """The gradients with float32 accumulation and weights G rounded once to the dtype of the features."""
    dtype = case.operands[0].dtype
    x, y, scale, *_ = case.to(torch.float32)
    rounded = pair_gradients(case, torch.float32).to(dtype).float()
    weighted, column = rounded @ y, scale[:, None] if scale.dim() else scale
    cosines = (x * weighted).sum(1)
    found = {
        "dx": (column * weighted).to(dtype),
        "dy": (rounded.T @ (column * x)).to(dtype),
        "dscale": cosines if scale.dim() else cosines.sum(),
    }
    return {name: relative_error(value, truth[name], sizes.get(name, 0.0)) for name, value in found.items()}


@pytest.mark.parametrize("seed", range(CASES))
def test_no_worse_than_dense_float32(seed):
    assert_no_worse_than_dense_float32(random_case(seed), contenders(seed < TRITON_CASES))


@pytest.mark.parametrize("seed", range(RICHER_CASES))
def test_every_reduction_is_no_worse_than_dense_float32(seed):
    assert_no_worse_than_dense_float32(random_case(seed, richer=True), contenders(seed < RICHER_TRITON_CASES))


def assert_no_worse_than_dense_float32(case: Case, backends: list[tuple[str, bool]]) -> None:
    with use_backend("reference"):
        truth = outcome(case, case.to(torch.float64))
    sizes = cancelling_sizes(case)
    dense, dtype = dense_errors(case, truth, sizes), case.operands[0].dtype
    rounding: dict[str, float] = {}
    if dtype != torch.float32:
        # The gradient of the largest is a sum of its own, rounded by itself before it meets the others.
        shares = 1 + sum(isinstance(each, (Max, TopK)) for each in (*case.rows, *case.cols))
        for name, error in dense_16_bit_errors(case, truth, sizes).items():
            # Two ways of rounding the same numbers differ in luck; half an eps is the rounding of dx itself.
            rounding[name] = max(error * 1.2, shares * torch.finfo(dtype).eps / 2)
    for backend, portable in backends:
        with use_backend(backend), portable_product(portable):
            found = outcome(case, case.operands)
        floor, factor = BOUNDS[backend]
        for name, value in found.items():
            error = relative_error(value, truth[name], sizes.get(name, 0.0))
            allowed = max(floor, factor * dense[name], rounding.get(name, 0.0))
            assert allowed < 0.1, "the bounds must mean something"
            assert error <= allowed, f"{backend}{' portable' * portable}: {name} {error:.2g} > {allowed:.2g}"


# ---- aligned pairs: where dense float32 loses its digits ----------------------------------------------------------


def clip_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The symmetric cross-entropy in its softplus form, which does not cancel (nor does its float64 reference)."""
    asked = (LogSumExp(Diagonal()), PairScore())
    by_row, by_col = similarity_reduce(x, y, scale=scale, rows=asked, cols=asked)
    return sum(-F.logsigmoid(own - others).mean() / 2 for others, own in (by_row, by_col))


@pytest.mark.parametrize(("size", "bound"), [(14.3, 2e-6), (100.0, 1e-5)])
def test_aligned_pairs_keep_their_digits(backend, embeddings, size, bound):
    if backend == "reference":
        pytest.skip("dense float32 is what this compares with")
    x, y = (each.float().requires_grad_() for each in embeddings(200, 200, 64, cosine=0.95))
    scale = torch.tensor(size)
    exact = [each.detach().double().requires_grad_() for each in (x, y)]
    with use_backend("reference"):
        truth = torch.autograd.grad(clip_loss(*exact, scale.double()), exact)
    found = torch.autograd.grad(clip_loss(x, y, scale), (x, y))
    labels = torch.arange(len(x))
    logits = scale * x @ y.T
    dense = torch.autograd.grad((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2, (x, y))
    for given, by_torch, expected in zip(found, dense, truth, strict=True):
        error = relative_error(given, expected, 0.0)
        assert error < bound
        assert error * 10 < relative_error(by_torch, expected, 0.0)


# ---- the same bits ------------------------------------------------------------------------------------------------


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("seed", range(1000, 1010))
def test_two_runs_give_the_same_bits(backend, seed):
    case = random_case(seed, richer=seed % 2 == 1)
    first = outcome(case, case.operands)
    assert all(same(first, outcome(case, case.operands)) for _ in range(2))


def plain(n: int, m: int) -> tuple[list, list]:
    ids = SameId(torch.randint(40, (n,)), torch.randint(40, (m,)))
    rows = [LogSumExp(Diagonal()), SoftplusSum((Diagonal(), ids)), PairScore()]
    return rows, [LogSumExp(ids, torch.rand(n)), LogSumExp(Diagonal())]


def losses_only(n: int, m: int) -> tuple[list, list]:
    """The request of CLIP, which takes shorter paths."""
    return [LogSumExp(Diagonal()), PairScore()], [LogSumExp(Diagonal()), PairScore()]


def distilled(n: int, m: int) -> tuple[list, list]:
    teacher = Teacher(torch.randn(n, 20), torch.randn(m, 20), 3.0)
    rows = [LogSumExp(), SoftmaxMean(under=teacher), HingeSum(), TopK(5)]
    return rows, [SoftmaxMean(under=teacher), SoftmaxMean(), Max(), LogSumExp(of=teacher)]


def big_case(dtype: torch.dtype, request: Callable[[int, int], tuple[list, list]]) -> Case:
    """Several tiles in both directions, so that threads have something to share."""
    choose, n, m, d = random.Random(0), 531, 777, 65
    torch.manual_seed(0)
    x, y = (each.to(dtype) for each in random_features(choose, n, m, d))
    biases = [torch.tensor(-1.0), torch.randn(n), torch.randn(m)] if request is not losses_only else [None] * 3
    case = Case([x, y, torch.tensor(20.0), *biases])
    case.rows, case.cols = request(n, m)
    case.upstream = random_upstream(case)
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("request_of", [plain, losses_only, distilled])
def test_any_number_of_threads_gives_the_same_bits(cpp, dtype, request_of):
    case = big_case(dtype, request_of)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(outcome(case, case.operands))
    finally:
        torch.set_num_threads(before)
    assert same(outcomes[0], outcomes[1])
    assert same(outcomes[0], outcomes[2])
