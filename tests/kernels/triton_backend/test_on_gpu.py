"""`pytest -m gpu`, on a machine with a GPU: one case for each operator, dtype and configuration, against float64.

The rest of the suite runs the same kernels in Triton's interpreter; here is what that cannot show: real matrix
instructions, bfloat16 and TF32 products, streams, devices, and graphs. Do not set TRITON_INTERPRET.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from pairtile.kernels import (
    ArgTopK,
    ClipLoss,
    SigLipLoss,
    TopK,
    linear_cross_entropy,
    similarity_reduce,
    use_backend,
)
from pairtile.kernels.contrastive.triton_kernels import launching
from similarity_cases import NAMES, cancelling_sizes
from triton_requests import REQUESTS, request_case, run_request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: What each way to multiply float32 features loses of a score of size 14, and so of a gradient, relative to it: TF32
#: has 10 bits of mantissa, of which rounding loses half a unit, 5e-4; three such products leave the 2^-22 of the
#: smallest one that is left out; IEEE float32 has the project's own bound.
PRECISIONS = {"ieee": 5e-6, "tf32x3": 5e-5, "tf32": 3e-2}

#: Requests of teachers, hinges and the largest.
BEYOND_SUMS = ("distillation", "above and largest")


def assert_close(found, expected, bound, sizes=None):
    for k, (given, truth) in enumerate(zip(found, expected, strict=True)):
        given, truth = given.double().cpu(), truth.double().cpu()
        finite = truth.isfinite()
        assert torch.equal(given.isfinite(), finite), f"result {k}"
        error = (given - truth)[finite].norm() / truth[finite].norm().clamp_min(sizes[k] if sizes else 1e-3)
        assert error < bound, f"result {k}: {error:.2g} >= {bound:.2g}"


def bound_of(dtype: torch.dtype, precision: str = "ieee") -> float:
    # Gradients of 16-bit features, and the weights they are made of, are rounded to that dtype.
    return PRECISIONS[precision] if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def check(name, n, m, d, dtype, *, aligned, precision=None, budget=None):
    case = request_case(name, n, m, d, dtype, aligned=aligned, device="cuda")
    case.budget = budget
    with use_backend("triton"):
        found = run_request(case, precision=precision)
    with use_backend("reference"):
        expected = run_request(case, dtype=torch.float64)
    sizes = None
    if name in BEYOND_SUMS:  # means pass through zero, and hinges are differences
        known = cancelling_sizes(request_case(name, n, m, d, dtype, aligned=aligned))
        results = [f"result {k}" for k in range(len(case.rows) + len(case.cols))]
        present = [f"d{name}" for name, each in zip(NAMES, case.operands, strict=True) if each is not None]
        sizes = [max(1e-3, known.get(each, 0.0)) for each in (*results, *present)]
    assert_close(found, expected, bound_of(dtype, precision or "ieee"), sizes)


KINDS = [*((dtype, "ieee") for dtype in DTYPES), *((torch.float32, each) for each in ("tf32", "tf32x3"))]


@pytest.mark.parametrize("aligned", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("name", REQUESTS)
def test_every_request_equals_float64(name, dtype, precision, aligned):
    # Thresholds and ranks are left to exact products: TF32 puts borderline pairs on either side.
    if name in ("everything", "above and largest") and precision != "ieee":
        name = "CLIP"
    check(name, 530, 777, 264 if aligned else 269, dtype, aligned=aligned, precision=precision)


@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_the_configurations_of_older_devices(monkeypatch, arch, dtype, precision):
    own = launching.architecture(torch.device("cuda"))
    if not own.startswith("sm") or int(arch[2:]) > int(own[2:]):
        pytest.skip(f"a device of {own} has not what {arch} asks for")
    monkeypatch.setattr(launching, "architecture", lambda device: arch)
    check("CLIP", 300, 530, 136, dtype, aligned=True, precision=precision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 1), (1, 5000, 8), (5000, 1, 8), (257, 255, 1), (64, 64, 3000), (9, 9, 0)]
)
def test_shapes(n, m, d, dtype):
    check("CLIP", n, m, d, dtype, aligned=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["CLIP", *BEYOND_SUMS])
def test_several_panels(name, dtype):
    check(name, 1500, 1300, 72, dtype, aligned=True, budget=1_000_000)


@pytest.mark.parametrize("k", [8, 100])  # picked in the tile, left to torch
def test_among_equal_scores_the_lowest_index_comes_first(k):
    generator = torch.Generator().manual_seed(k)
    x, y = (torch.randint(-2, 3, (rows, 16), generator=generator).half().cuda() for rows in (1500, 1300))
    outcomes = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results = similarity_reduce(x, y, scale=3.0, rows=[TopK(k), ArgTopK(k)], cols=[TopK(k), ArgTopK(k)])
        outcomes.append([*results[0], *results[1]])
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(dtype):
    case = request_case("CLIP", 2000, 3000, 256, dtype, aligned=True, device="cuda")
    with use_backend("triton"):
        first, second = run_request(case), run_request(case)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()], ids=lambda loss: type(loss).__name__)
def test_losses_and_their_step_compiled(loss, dtype):
    torch.compiler.reset()
    x, y = (F.normalize(torch.randn(512, 128, device="cuda"), dim=1).to(dtype).requires_grad_() for _ in "xy")
    scalars = [torch.tensor(14.3, device="cuda", requires_grad=True)]
    if isinstance(loss, SigLipLoss):
        scalars.append(torch.tensor(-10.0, device="cuda", requires_grad=True))
    leaves = [x, y, *scalars]
    with use_backend("triton"):
        plain = loss(*leaves)
        gradients = torch.autograd.grad(plain, leaves)
        compiled = torch.compile(loss, fullgraph=True)(*leaves)
        of_compiled = torch.autograd.grad(compiled, leaves)
    with use_backend("reference"):
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        truth = loss(*exact)
        expected = torch.autograd.grad(truth, exact)
    assert_close([plain, *gradients], [truth, *expected], 4 * bound_of(dtype))
    assert_close([compiled, *of_compiled], [truth, *expected], 4 * bound_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype):
    hidden, vocabulary = torch.randn(700, 128, device="cuda"), torch.randn(5000, 128, device="cuda") / 11
    targets = torch.randint(5000, (700,), device="cuda").index_fill(0, torch.arange(5, device="cuda"), -100)
    leaves = [each.to(dtype).requires_grad_() for each in (hidden, vocabulary)]
    with use_backend("triton"):
        loss = linear_cross_entropy(*leaves, targets)
        found = [loss, *torch.autograd.grad(loss, leaves)]
    exact = [each.detach().double().requires_grad_() for each in leaves]
    truth = F.cross_entropy(exact[0] @ exact[1].T, targets)
    assert_close(found, [truth, *torch.autograd.grad(truth, exact)], bound_of(dtype))


def test_rows_beyond_the_31st_bit():
    """2^25 float16 numbers between two rows: the last ones lie beyond 2^31. Takes 4.4 GiB."""
    n, stride = 70, 2**25
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    for d in (9, 16):
        case = request_case("CLIP", n, n, d, torch.float16, aligned=True, device="cuda")
        with use_backend("triton"):
            near = run_request(case)
            far = torch.empty(n * stride, dtype=torch.float16, device="cuda").as_strided((n, d), (stride, 1))
            case.operands[1] = far.copy_(case.operands[1])
            assert_close(run_request(case), near, bound_of(torch.float16))
        del far


def test_streams_do_not_mix():
    case = request_case("CLIP", 1024, 1024, 256, torch.bfloat16, aligned=True, device="cuda")
    with use_backend("triton"):
        expected = run_request(case)
        torch.cuda.synchronize()
        found = []
        for _ in range(4):
            with torch.cuda.stream(torch.cuda.Stream()):
                found.append(run_request(case))
        torch.cuda.synchronize()
    for outcome in found:
        assert all(map(torch.equal, outcome, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one():
    outcomes = []
    for device in ("cuda:0", "cuda:1"):
        case = request_case("CLIP", 300, 300, 64, torch.float32, aligned=True, device=device)
        with use_backend("triton"):
            outcomes.append(run_request(case))
        assert all(each.device == torch.device(device) for each in outcomes[-1])
    for one, other in zip(*outcomes, strict=True):
        assert_close([other], [one], 5e-6)


def test_the_device_waits_for_nobody():
    """No launch needs a number from the device: the host must not stop to fetch one."""
    case = request_case("CLIP", 256, 256, 64, torch.bfloat16, aligned=True, device="cuda")
    x, y, scale, *_ = case.operands
    leaves = [each.detach().requires_grad_() for each in (x, y, scale)]
    with use_backend("triton"):
        ClipLoss()(*leaves).backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            ClipLoss()(*leaves).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_gpu_tensors_are_served_by_triton():
    assert not launching.interpreting(), "unset TRITON_INTERPRET"
    x = torch.ones(3, 8, device="cuda", requires_grad=True)
    (lse,), _ = similarity_reduce(x, x.detach(), scale=1.0, rows=REQUESTS["CLIP"](3, 3, 0.0)[0][:1])
    with pytest.raises(RuntimeError, match="twice on the triton backend"):
        torch.autograd.grad(torch.autograd.grad(lse.sum(), x, create_graph=True)[0].sum(), x)
