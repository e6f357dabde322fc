"""`pytest -m gpu`: late interaction on a GPU against float64. `test_late_kernels.py` runs the same kernels interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from pairtile.kernels import LogSumExpPooling, MaxPooling, SoftmaxPooling, maxsim_varlen, project_max, use_backend
from pairtile.kernels.contrastive.triton_kernels import launching
from pairtile.kernels.late_interaction.scores import token_scores
from pairtile.kernels.late_interaction.token_sets import TokenSets, padded_sets
from triton_late import masked, scored, sides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = [*((dtype, "ieee") for dtype in DTYPES), *((torch.float32, each) for each in ("tf32", "tf32x3"))]
#: (n, lx, m, ly, D, candidates): texts and patches, two long sides, queries and documents, candidates, one of each.
SHAPES = [(40, 32, 33, 196, 128, 0), (9, 300, 7, 257, 96, 0), (70, 20, 50, 700, 264, 0), (9, 32, 45, 300, 128, 5)]
SHAPES += [(1, 1, 1, 1, 8, 0)]


def unit_sides(n: int, lx: int, m: int, ly: int, width: int, dtype: torch.dtype) -> tuple[TokenSets, TokenSets]:
    """Random unit vectors, masked, NaN in what does not count."""
    found = []
    for name, count, length in (("x", n, lx), ("y", m, ly)):
        generator = torch.Generator().manual_seed(count + length)
        mask = masked(count, length, empty=0) if count > 1 else torch.ones(count, length, dtype=torch.bool)
        tokens = F.normalize(torch.randn(count, length, width, generator=generator), dim=-1).to(dtype)
        found.append(padded_sets(tokens.masked_fill(~mask[:, :, None], torch.nan).cuda(), mask.cuda(), name))
    return found[0], found[1]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], bound: float) -> None:
    for k, (given, truth) in enumerate(zip(found, expected, strict=True)):
        given, truth = given.double(), truth.double()
        finite = truth.isfinite()
        assert torch.equal(given.isfinite(), finite), f"result {k}"
        error = (given - truth)[finite].norm() / truth[finite].norm().clamp_min(1e-3)
        assert error < bound, f"result {k}: {error:.2g} >= {bound:.2g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maxima_of_exact_products_are_the_references(shape, dtype):
    """Small integers, half of them twice: which of equals is chosen shows in the gradients."""
    *sizes, width, candidates = shape
    x, y = sides(*sizes, width, dtype=dtype, device="cuda")
    outcomes = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            outcomes.append(scored(x, y, pooling=MaxPooling(), candidates=candidates, cols=True))
    assert all(map(torch.equal, outcomes[0][:2], outcomes[1][:2]))
    # Gradients are rounded once; the reference adds in another order.
    assert_close(outcomes[0][2:], outcomes[1][2:], 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("pooling", [MaxPooling(), SoftmaxPooling(0.2), LogSumExpPooling(0.2)], ids=str)
def test_scores_and_gradients_equal_float64(shape, dtype, precision, pooling):
    *sizes, width, candidates = shape
    x, y = unit_sides(*sizes, width, dtype)
    with use_backend("triton"):
        found = scored(x, y, pooling=pooling, candidates=candidates, cols=True, precision=precision)
    wide = [each.with_tokens(each.tokens.double()) for each in (x, y)]
    with use_backend("reference"):
        expected = scored(*wide, pooling=pooling, candidates=candidates, cols=True)
    # tf32 has 10 bits of mantissa; a temperature of 0.2 makes five times as much of an error of a score.
    bound = {"ieee": 5e-6, "tf32x3": 5e-5, "tf32": 1e-2}[precision]
    assert_close(found[:2], expected[:2], bound)
    # Which of two close rivals is chosen is a matter of rounding: the gradient of a maximum is held to exact products.
    if not isinstance(pooling, MaxPooling):
        assert_close(found[2:], expected[2:], bound if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sets_and_nothing_kept(dtype):
    generator = torch.Generator().manual_seed(0)
    bounds = [torch.randint(0, 90, (count,), generator=generator).cumsum(0) for count in (30, 50)]
    bounds = [F.pad(each, (1, 0)).cuda() for each in bounds]
    tokens = [torch.randint(-2, 3, (int(each[-1]), 72), generator=generator).to("cuda", dtype) for each in bounds]
    outcomes = []
    for backend, budget in (("reference", None), ("triton", None), ("triton", 10_000)):
        leaves = [each.clone().requires_grad_() for each in tokens]
        with use_backend(backend):
            scores = maxsim_varlen(leaves[0], bounds[0], leaves[1], bounds[1], memory_budget=budget)
        scores.masked_fill(scores.isinf(), 0).sum().backward()
        outcomes.append([scores.detach(), *(leaf.grad for leaf in leaves)])
    for found in outcomes[1:]:
        assert torch.equal(found[0], outcomes[0][0])
        assert_close(found[1:], outcomes[0][1:], 5e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_max(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (9, 40, 520), generator=generator).to("cuda", dtype).requires_grad_()
    weight = torch.randint(-2, 3, (1000, 520), generator=generator).to("cuda", dtype).requires_grad_()
    upstream = torch.randint(-2, 3, (9, 1000), generator=generator).cuda().float()
    outcomes = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            largest = project_max(hidden, weight)
            outcomes.append([largest, *torch.autograd.grad((largest * upstream).sum(), (hidden, weight))])
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
def test_the_configurations_of_older_devices(monkeypatch, arch, dtype, precision):
    own = launching.architecture(torch.device("cuda"))
    if not own.startswith("sm") or int(arch[2:]) > int(own[2:]):
        pytest.skip(f"a device of {own} has not what {arch} asks for")
    monkeypatch.setattr(launching, "architecture", lambda device: arch)
    for pooling in (MaxPooling(), SoftmaxPooling(0.2)):
        test_scores_and_gradients_equal_float64(SHAPES[0], dtype, precision, pooling)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype):
    for pooling in (MaxPooling(), SoftmaxPooling(0.2)):
        x, y = unit_sides(*SHAPES[0][:5], dtype)
        with use_backend("triton"):
            first, second = (scored(x, y, pooling=pooling, cols=True) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_a_scoring_step_within_a_graph():
    """No launch waits for the GPU: the step can be captured."""
    x, y = unit_sides(*SHAPES[0][:5], torch.bfloat16)
    with use_backend("triton"):
        (expected,) = token_scores(x, y, pooling=MaxPooling())
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            token_scores(x, y, pooling=MaxPooling())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (captured,) = token_scores(x, y, pooling=MaxPooling())
    graph.replay()
    assert torch.equal(captured, expected)
