"""The CUDA kernels of token merging: their bodies run on the CPU, what nvcc makes of them, and, on a GPU, themselves."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import token_merging as papers
import torch
from torch import Tensor

from cuda_bodies import SOURCES, CudaBodies, compile_bodies
from pairtile.kernels import use_backend
from pairtile.kernels.build import compiler
from pairtile.kernels.build_cuda import cuda_operators_obstacle
from pairtile.kernels.token_merging import (
    Matching,
    bipartite_matching,
    bipartite_soft_matching,
    combine,
    cuda_backend,
    merge_tokens,
    similarity,
)
from pairtile.kernels.token_merging.similarity import TORCH
from pairtile.kernels.token_merging.tome import matched

SPECIAL = [(False, False), (True, False), (True, True), (False, True)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return compile_bodies(compiler(), tmp_path_factory.mktemp("bodies"))


@pytest.fixture
def bodies(library, monkeypatch):
    """Tensors on the CPU are served as CUDA's are, by the kernels' bodies."""
    found = CudaBodies(library)
    of_cuda = {name: getattr(similarity.SIMILARITIES["cuda"], name) for name in ("select", "most_tokens")}
    for name in ("cuda_select_pairs", "cuda_combine_tokens", "cuda_average_tokens", "cuda_spread_tokens"):
        monkeypatch.setattr(torch.ops.pairtile, name, getattr(found, name), raising=False)
    for module in (similarity, combine):
        monkeypatch.setattr(module, "with_cuda", lambda backend, device: "cuda" if backend == "torch" else backend)
    monkeypatch.setitem(similarity.SIMILARITIES, "cuda", TORCH._replace(**of_cuda))
    with use_backend("torch"):
        yield found


def assert_same(found: Matching, expected: papers.Indices) -> None:
    for each, right in zip((found.kept, found.sources, found.places), expected, strict=True):
        assert each.tolist() == right


def assert_equal(found: Matching, expected: Matching) -> None:
    for name in ("kept", "sources", "places"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


# ---- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("class_token", "distill_token"), SPECIAL)
def test_selection_as_the_paper_says(bodies, class_token, distill_token):
    """Signs, whose cosines are exact, half of them copies; every r."""
    torch.manual_seed(0)
    for tokens in (2, 3, 4, 5, 8, 17, 34):
        metric = torch.randint(0, 2, (2, tokens, 16)) * 2.0 - 1
        metric[:, torch.randint(tokens, (tokens // 2,))] = metric[:, torch.randint(tokens, (tokens // 2,))]
        for r in range(tokens // 2 + 1):
            expected = papers.tome(metric, r, class_token, distill_token)
            assert_same(bipartite_matching(metric, r, class_token, distill_token), expected)
    assert "select" in bodies.calls


def hostile_similarities(batch: int, count: int) -> Tensor:
    """Ties, both zeros, infinities, NaN of both signs, denormals."""
    values = torch.tensor([0.0, -0.0, 0.5, -0.5, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-42, -1e-42])
    found = values[torch.randint(len(values), (batch, count))]
    return torch.where(torch.rand(batch, count) < 0.5, found, torch.randn(batch, count))


@pytest.mark.parametrize("tokens", [41, 384, 386, 1281, 5121, 16384])
def test_selection_of_any_similarities_in_every_size_of_block(bodies, tokens):
    """As torch's stable sort has it; the largest and the smallest sample of a block of each size."""
    choose = random.Random(tokens)
    torch.manual_seed(tokens)
    even, odd = (tokens + 1) // 2, tokens // 2
    partner = torch.randint(odd, (2, even))
    for protected, (class_token, distill_token) in zip((0, 0, 3, 5, 0), [*SPECIAL, (False, True)], strict=True):
        best = hostile_similarities(2, even)
        best[:, : max((protected + 1) // 2, int(class_token))] = -torch.inf
        for r in (1, choose.randrange(1, (tokens - 5) // 2), (tokens - 5) // 2):
            given = best, partner, tokens, r, protected, class_token, distill_token
            found = matched(*given)
            with use_backend("reference"):
                assert_equal(found, matched(*given))
    assert len(bodies.calls) == 15


def test_registers_and_distillation_as_without_the_kernel(bodies):
    metric = torch.randint(0, 2, (2, 41, 16)) * 2.0 - 1
    for protected in (1, 2, 5, 38):
        for distill in (False, True):
            found = bipartite_matching(metric, 30, False, distill, protected=protected)
            with use_backend("reference"):
                assert_equal(found, bipartite_matching(metric, 30, False, distill, protected=protected))


def test_samples_of_more_tokens_than_a_block_sorts_go_another_way(bodies, monkeypatch):
    assert bodies.library.most_selection_tokens() == cuda_backend.MOST_TOKENS
    limited = similarity.SIMILARITIES["cuda"]._replace(most_tokens=8)
    monkeypatch.setitem(similarity.SIMILARITIES, "cuda", limited)
    for tokens, served in ((8, True), (9, False)):
        metric = torch.randint(0, 2, (1, tokens, 16)) * 2.0 - 1
        bodies.calls.clear()
        assert_same(bipartite_matching(metric, 3), papers.tome(metric, 3))
        assert ("select" in bodies.calls) == served


# ---- merging ----------------------------------------------------------------------------------------------------------


def some_matching(batch: int, tokens: int, merged: int, one_place: bool) -> Matching:
    order = torch.rand(batch, tokens).argsort(1)
    kept, sources = order[:, merged:], order[:, :merged]
    return Matching(kept, sources, torch.randint(1 if one_place else tokens - merged, sources.shape))


def assert_moves(dtype: torch.dtype, width: int, one_place: bool, device: str = "cpu") -> None:
    """Both maps, in value, in gradient and in its gradient, against the matrix that they are, in float64."""
    tokens, merged = 90, 50
    # Neighbouring channels of a wider tensor, samples behind tokens.
    x = torch.randn(tokens, 2, width + 16, device=device).to(dtype).transpose(0, 1)[..., :width]
    matching = some_matching(2, tokens, merged, one_place)
    matching = Matching(*(each.to(device) for each in (matching.kept, matching.sources, matching.places)))
    size = torch.randint(1, 5, (2, tokens, 1), device=device).float()
    assigned = torch.zeros(2, tokens - merged, tokens, dtype=torch.float64, device=device)
    assigned.scatter_(1, matching.place_of().unsqueeze(1), size.double().mT)
    totals = assigned.sum(-1, keepdim=True)
    assigned /= totals
    # Half a unit in the last place, and the rounding of a float32 sum of up to 51 tokens.
    tolerance = {"atol": 2e-6, "rtol": torch.finfo(dtype).eps / 2 + 1e-6}

    leaf = x.detach().requires_grad_()
    found, sizes = merge_tokens(leaf, matching, size)
    assert found.dtype == dtype
    assert torch.equal(sizes.double(), totals)
    torch.testing.assert_close(found.double(), assigned @ x.double(), **tolerance)
    alone = (assigned != 0).sum(-1) == 1
    assert alone.any()
    stayed = x.gather(1, matching.kept.unsqueeze(-1).expand(-1, -1, width))
    assert torch.equal(found[alone], stayed[alone]), "what is not merged keeps its bits"

    upstream = torch.randn(found.shape, device=device).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(found, leaf, upstream, create_graph=True)
    torch.testing.assert_close(gradient.double(), assigned.mT @ upstream.double(), **tolerance)
    (second,) = torch.autograd.grad(gradient, upstream, x)
    assert torch.equal(second, found), "the map is linear: its transpose's transpose is the map"


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 516), (torch.float32, 131), (torch.bfloat16, 520)])
@pytest.mark.parametrize("one_place", [False, True])
def test_moves_of_tokens_against_float64(bodies, dtype, width, one_place):
    """In packets of 16 bytes over more than one slab of channels, and one by one."""
    torch.manual_seed(width)
    assert_moves(dtype, width, one_place)
    assert set(bodies.calls) == {"combine", "spread"}


def test_packets_are_read_where_all_of_them_are_aligned(library):
    """A GPU faults where a CPU does not."""
    call = ctypes.CDLL(str(library)).in_packets
    call.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    call.restype = ctypes.c_bool
    right = [64, 800, 40, 128, 8]
    assert call(*right)
    for argument, off in ((0, 4), (1, 2), (2, 1), (3, 8), (4, 3)):
        assert not call(*[each + off * (k == argument) for k, each in enumerate(right)])


def test_averages_without_sizes_and_weights_of_crossget(bodies):
    x, matching = torch.randn(2, 9, 4), some_matching(2, 9, 4, one_place=False)
    weighted = Matching(matching.kept, matching.sources, matching.places, torch.rand(2, 9))
    for each in (matching, weighted):
        for size in (None, torch.randint(1, 5, (2, 9, 1)).float()):
            found = merge_tokens(x, each, size)
            with use_backend("reference"):
                right = merge_tokens(x, each, size)
            torch.testing.assert_close(found[0], right[0])
            assert torch.equal(found[1], right[1])


def test_empty_batches_channels_and_expanded_gradients(bodies):
    for shape in ((0, 9, 4), (2, 9, 0)):
        matching = some_matching(shape[0], 9, 4, one_place=False)
        tokens, sizes = merge_tokens(torch.randn(shape), matching)
        assert tokens.shape == (shape[0], 5, shape[2])
        assert sizes.sum() == shape[0] * 9
    x = torch.randn(2, 9, 5, requires_grad=True)
    merge, unmerge = bipartite_soft_matching(x, 3)
    (gradient,) = torch.autograd.grad(merge(x, mode="sum").sum() + unmerge(merge(x)).sum(), x)
    torch.testing.assert_close(gradient.sum(), torch.tensor(2.0 * 2 * 9 * 5))


def test_the_average_as_an_operator_of_the_compiler(bodies):
    x, matching = torch.randn(2, 9, 4, requires_grad=True), some_matching(2, 9, 4, one_place=False)
    indices = matching.kept, matching.sources, matching.places, matching.place_of()
    sizes = torch.randint(1, 5, (2, 9)).float()
    for numbers in ((sizes, sizes), (None, None)):
        given = x, *indices, *numbers, "torch"
        torch.library.opcheck(combine._average_op, given, test_utils=("test_schema", "test_faketensor"))
        tokens, totals = combine._average_op(*given)
        right, right_totals = combine.average(x, matching, *numbers)
        assert torch.equal(tokens, right)
        assert torch.equal(totals, right_totals)
        upstream = torch.randn(tokens.shape)
        assert torch.equal(*(torch.autograd.grad(each, x, upstream)[0] for each in (tokens, right)))


# ---- what the compilers say -------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_the_kernels_without_spills(tmp_path):
    """For Ampere, Hopper and Blackwell, or those of them that it knows."""
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    targets = [each for each in (80, 90, 100) if f"sm_{each}" in known]
    flags = ["-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings", "--threads=2"]
    flags += [f"-gencode=arch=compute_{each},code=sm_{each}" for each in targets]
    running = {}
    for source in sorted(SOURCES.glob("*.cu")):
        command = ["nvcc", "-fatbin", *flags, source, "-o", tmp_path / f"{source.stem}.fatbin"]
        running[source.stem] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for name, kernels in (("token_selection", 4), ("token_merging", 12)):
        told, _ = running[name].communicate(timeout=600)
        assert running[name].returncode == 0, told
        registers = [int(each) for each in re.findall(r"Used (\d+) registers", told)]
        assert len(registers) == len(targets) * kernels > 0
        assert max(registers) <= 128, "512 threads of 128 registers are all that an SM has"
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told)
        assert set(used) == {("0", "0", "0")}
        shared = [int(each) for each in re.findall(r"(\d+) bytes smem", told)]
        assert max(shared, default=0) <= 48 << 10, "what a block may have without asking"


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_the_binding_agrees_with_torch():
    headers = Path(torch.__file__).parent / "include"
    of_cuda = next((each for each in cuda_headers() if (each / "cuda_runtime_api.h").exists()), None)
    if of_cuda is None or not (headers / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h").exists():
        pytest.skip("no headers of CUDA, or a torch without it")
    flags = ["-std=c++20", "-fsyntax-only", "-isystem", headers, "-isystem", of_cuda]
    command = [compiler(), *flags, "-Wall", "-Werror", SOURCES / "token_operators.cpp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def cuda_headers() -> list[Path]:
    """Where they may be: in the toolkit, and in the packages that torch asks for."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    return [toolkit, *sorted(Path(torch.__file__).parents[1].glob("nvidia/*/include"))]


# ---- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served_by_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if (obstacle := cuda_operators_obstacle()) is not None:
        pytest.skip(f"pairtile's CUDA operators {obstacle}")


@pytest.mark.gpu
@pytest.mark.parametrize(("class_token", "distill_token"), SPECIAL)
def test_selection_on_a_gpu(served_by_cuda, class_token, distill_token):
    torch.manual_seed(0)
    for tokens in (2, 3, 5, 198, 385, 386):
        metric = torch.randint(0, 2, (3, tokens, 16)) * 2.0 - 1
        for r in {1, tokens // 5, tokens // 2}:
            expected = papers.tome(metric, r, class_token, distill_token)
            assert_same(bipartite_matching(metric.cuda(), r, class_token, distill_token), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [41, 384, 386, 1281, 5121, 16384])
def test_selection_of_any_similarities_on_a_gpu(served_by_cuda, library, tokens):
    """As the same source has it on the CPU."""
    torch.manual_seed(tokens)
    best, partner = hostile_similarities(70, (tokens + 1) // 2), torch.randint(tokens // 2, (70, (tokens + 1) // 2))
    for options in ((0, False, False), (0, True, True), (5, False, False)):
        given = tokens, (tokens - 5) // 3, *options
        right = CudaBodies(library).cuda_select_pairs(best, partner, *given)
        found = torch.ops.pairtile.cuda_select_pairs(best.cuda(), partner.cuda(), *given)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, right, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 131, 768, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_moves_of_tokens_on_a_gpu(served_by_cuda, dtype, width):
    for one_place in (False, True):
        assert_moves(dtype, width, one_place, "cuda")


@pytest.mark.gpu
def test_merging_within_a_graph_and_under_the_compiler(served_by_cuda):
    """No launch waits for the GPU; the fused paths are traced whole."""
    metric, x = torch.randn(8, 197, 64, device="cuda"), torch.randn(8, 197, 768, device="cuda", requires_grad=True)

    def step() -> tuple[Tensor, Tensor]:
        tokens, _ = merge_tokens(x, bipartite_matching(metric, 16, True))
        return tokens.detach(), torch.autograd.grad(tokens.square().sum(), x)[0]

    expected = step()
    assert all(map(torch.equal, expected, torch.compile(step, fullgraph=True)()))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(map(torch.equal, expected, captured))
