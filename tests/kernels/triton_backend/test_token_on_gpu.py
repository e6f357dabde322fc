"""`pytest -m gpu`: token merging on a GPU against float64. `test_token_kernels.py` runs the same kernels interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from pairtile.kernels import use_backend
from pairtile.kernels.contrastive.triton_kernels import launching
from pairtile.kernels.token_merging import bipartite_matching, complete_graph_matching, merge_tokens, pitome_matching
from pairtile.kernels.token_merging.combine import spread
from pairtile.kernels.token_merging.similarity import TORCH, Partners, best_partners, energies
from triton_late import integers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: (B, N, D): a ViT-B's metric, a video's, odd numbers in chunks, one of each.
SHAPES = [(32, 197, 64), (2, 1025, 80), (3, 331, 509), (1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partners_of_exact_products_are_the_references(shape, dtype):
    x = integers(*shape).to("cuda", dtype)
    keep = torch.rand(shape[:2], device="cuda") < 0.8
    for partners in Partners:
        for masks in ((None, None), (keep, keep)):
            with use_backend("triton"):
                found = best_partners(x, x, x_keep=masks[0], y_keep=masks[1], partners=partners)
            right = TORCH.best_partners(x.double(), x.double(), *masks, partners, 1 << 28)
            assert torch.equal(found[0], right[0].float())
            assert torch.equal(found[1], right[1])


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_tokens_that_want_each_other_see_one_similarity(monkeypatch, arch, dtype):
    """Also by the configurations of older devices."""
    own = launching.architecture(torch.device("cuda"))
    if not own.startswith("sm") or int(arch[2:]) > int(own[2:]):
        pytest.skip(f"{own} does not run what is made for {arch}")
    monkeypatch.setattr(launching, "architecture", lambda device: arch)
    x = F.normalize(torch.randn(4, 900, 200, device="cuda"), dim=-1).to(dtype)
    with use_backend("triton"):
        best, index = best_partners(x, x, partners=Partners.OTHERS)
    mutual = index.gather(1, index) == torch.arange(900, device="cuda")
    assert torch.equal(best[mutual], best.gather(1, index)[mutual])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_energies_equal_float64(shape):
    x = F.normalize(torch.randn(shape, device="cuda"), dim=-1)
    with use_backend("triton"):
        found = energies(x, 0.45, 0.7)
    right = F.elu(x.double() @ x.double().mT - 0.45, alpha=0.7).mean(-1)
    # Rounding of float32 products and of f, some numbers of at most 1.
    torch.testing.assert_close(found.double(), right, atol=5e-7, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matchings_and_merges_are_those_of_torch(shape, dtype):
    # Signs of 16 channels: cosines are exact, and many are equal.
    metric = integers(*shape[:2], 16).sign().add(0.5).sign().to("cuda", dtype)
    x, size = torch.randn(shape, device="cuda").to(dtype), torch.randint(1, 9, (*shape[:2], 1), device="cuda").float()
    outcomes = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            matchings = [
                bipartite_matching(metric, shape[1] // 4, True),
                pitome_matching(metric, shape[1] // 4, -1.0),
                complete_graph_matching(metric, shape[1] // 4, protected=1),
            ]
            outcomes.append([])
            for each in matchings:
                leaf = x.clone().requires_grad_()
                merged, sizes = merge_tokens(leaf, each, size)
                restored = spread(merged, each)
                (grad,) = torch.autograd.grad((restored.float() * x.float()).sum(), leaf)
                outcomes[-1] += [each.kept, each.sources, each.places, sizes, merged, restored, grad]
    for found, right in zip(*outcomes, strict=True):
        if found.dtype == torch.int64:
            assert torch.equal(found, right)
        else:
            # Torch adds in any order; three roundings to the dtype from a merge to its gradient.
            torch.testing.assert_close(found, right, atol=1e-4, rtol=4 * torch.finfo(found.dtype).eps + 1e-5)
