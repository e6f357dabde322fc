"""The Triton kernels of token merging in the interpreter: what they do to memory, and what they find."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from token_maps import assert_both_maps_round_once
from triton_tokens import TOKEN_CALLS, some_matching

from pairtile.kernels import use_backend
from pairtile.kernels.contrastive.triton_kernels.configurations import ARCHITECTURES
from pairtile.kernels.token_merging import bipartite_matching, complete_graph_matching, merge_tokens, triton_combine
from pairtile.kernels.token_merging.combine import combine, spread
from pairtile.kernels.token_merging.similarity import TORCH, Partners, best_partners, energies
from pairtile.kernels.token_merging.triton_configurations import row_tile, sweep_config
from triton_late import integers

#: The kernels that each call is there for.
KERNELS = {
    "energies": {"energy_sweep"},
    "merged": {"combine_rows", "spread_rows"},
    "plain": {"combine_rows", "spread_rows"},
}


@pytest.fixture(autouse=True)
def _on_triton():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("name", TOKEN_CALLS)
def test_memory_order_and_results(gpu_safety, name):
    found = gpu_safety(TOKEN_CALLS[name])
    assert {kernel for kernel, _ in gpu_safety.launches} == KERNELS.get(name, {"partner_sweep"})
    with use_backend("torch"):
        expected = TOKEN_CALLS[name]()
    for given, truth in zip(found, expected, strict=True):
        if name in ("energies", "merged"):
            # Exponentials and shares of numbers up to 2; float32 sums of up to 70 of them in another order.
            torch.testing.assert_close(given, truth, rtol=1e-6, atol=2e-6)
        else:
            assert torch.equal(given, truth)


# ---- similarities -----------------------------------------------------------------------------------------------------


def test_partners_of_tokens_as_they_lie():
    wide = integers(2, 70, 24)
    for x, y in (
        (wide[:, ::2], wide[:, 1::2]),
        (wide[..., 3:11], wide[..., 3:11]),
        (wide.mT, wide.mT),
        (wide[:1].expand(2, -1, -1), wide),
        (wide[..., :0], wide[..., :0]),
    ):
        found, right = best_partners(x, y), TORCH.best_partners(x, y, None, None, 0, 1 << 30)
        assert all(torch.equal(*each) for each in zip(found, right, strict=True))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 19), (torch.bfloat16, 272)])
def test_partners_of_16_bit_tokens_by_their_exact_products(dtype, width):
    """D in one piece, and in chunks."""
    x, y = torch.randn(2, 70, width).to(dtype), torch.randn(2, 90, width).to(dtype)
    best, index = best_partners(x, y)
    scores = x.double() @ y.double().mT
    torch.testing.assert_close(best.double(), scores.amax(-1), atol=1e-4, rtol=0)  # `width` products in float32
    assert torch.equal(index, scores.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_tokens_that_want_each_other_see_one_similarity(dtype):
    x = F.normalize(torch.randn(2, 90, 40), dim=-1).to(dtype)
    best, index = best_partners(x, x, partners=Partners.OTHERS)
    mutual = index.gather(1, index) == torch.arange(90)
    assert mutual.any()
    assert torch.equal(best[mutual], best.gather(1, index)[mutual])


def test_nothing_to_choose_from():
    x = torch.randn(2, 5, 4)
    for best, index in (best_partners(x, x[:, :0]), best_partners(x, x, x_keep=torch.zeros(2, 5, dtype=torch.bool))):
        assert (best == -torch.inf).all()
        assert not index.any()
    assert best_partners(x[:0], x[:0])[0].shape == (0, 5)
    assert best_partners(x[:, :0], x)[1].shape == (2, 0)
    assert energies(x[:, :0], 0.5, 1.0).shape == (2, 0)


def test_nan_is_the_largest_and_harms_no_index():
    x = torch.randn(1, 90, 8)
    x[0, [5, 40, 80]] = torch.nan
    best, index = best_partners(x, x, partners=Partners.LATER)
    assert best[0, :80].isnan().all()
    assert index[0, :6].tolist() == [5] * 5 + [6]
    assert (index[0, 6:40] == torch.where(torch.isin(torch.arange(6, 40), torch.tensor([5, 40])), 41, 40)).all()
    for matching in (bipartite_matching(x, 7, True), complete_graph_matching(x, 7, torch.randn(1, 90))):
        tokens = torch.cat([matching.kept, matching.sources], 1).sort(1).values
        assert torch.equal(tokens, torch.arange(90).expand(1, -1))
        merge_tokens(x, matching)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_metrics_are_matched_by_their_cosines(dtype):
    metric = (torch.randn(2, 41, 24) * torch.rand(2, 41, 1).mul(4).exp()).to(dtype)
    metric[:, 7] = 0
    found = bipartite_matching(metric, 20, True)
    with use_backend("reference"):
        right = bipartite_matching(metric.double(), 20, True)
    for name in ("kept", "sources", "places"):
        assert torch.equal(getattr(found, name), getattr(right, name))


@pytest.mark.parametrize(("tokens", "width", "margin"), [(1, 4, 0.5), (66, 7, -0.4), (100, 64, 0.9), (33, 3, 90.0)])
def test_energies_against_float64(tokens, width, margin):
    x = F.normalize(torch.randn(3, tokens, width), dim=-1)
    x[:, -1] = x[:, 0]
    found = energies(x, margin, 0.7)
    right = F.elu(x.double() @ x.double().mT - margin, alpha=0.7).mean(-1)
    # Rounding of float32 products and of f, some numbers of at most 1.
    torch.testing.assert_close(found.double(), right, atol=5e-7, rtol=0)
    assert torch.equal(found[:, -1], found[:, 0]), "equal tokens have equal energies, whose order is by position"


def test_energies_keep_nan_and_small_differences():
    x = torch.tensor([[[1.0, 0.0], [1.0, 1e-6], [torch.nan, 0.0]]])
    assert energies(x, 1.0, 1.0).isnan().all()
    # f near 0, where exp(v) - 1 would be off by 6%.
    small = torch.tensor([[[1.0]]]) * (1 - 5e-7)
    torch.testing.assert_close(energies(small, 1.0, 1.0).double(), torch.expm1(small.double().square() - 1)[..., 0])


# ---- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_maps_round_once(dtype):
    assert_both_maps_round_once(some_matching(2, 90, 40), 90, 77, dtype)


def test_an_upstream_gradient_without_memory_of_its_own_and_nothing_at_all():
    x = torch.randn(2, 9, 5, requires_grad=True)
    (found,) = torch.autograd.grad(combine(x, some_matching(2, 9, 4), None, None).sum(), x)
    assert torch.equal(found, torch.ones_like(x))
    for shape in ((0, 7, 4), (2, 7, 0)):
        matching = some_matching(max(1, shape[0]), 7, 3)
        matching = type(matching)(*(each[: shape[0]] for each in (matching.kept, matching.sources, matching.places)))
        assert combine(torch.randn(shape), matching, None, None).shape == (shape[0], 4, shape[2])


def test_few_rows_per_program(monkeypatch):
    """As it is launched on a GPU; the interpreter otherwise gets more rows."""
    matching, x, size = some_matching(2, 9, 5), torch.randn(2, 9, 600), torch.rand(2, 9, 1)

    def both() -> list[torch.Tensor]:
        merged, sizes = merge_tokens(x, matching, size)
        return [merged, sizes, spread(merged, matching)]

    expected = both()
    monkeypatch.setattr(triton_combine, "row_tile", lambda width, interpreted: row_tile(width, False))
    assert all(map(torch.equal, both(), expected))


# ---- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_fit_the_work(arch):
    for dtype in (torch.float32, torch.bfloat16):
        for width in (16, 64, 96, 768):
            for rows, cols in ((5, 5), (99, 98), (513, 512)):
                config = sweep_config(arch, dtype, width, rows=rows, cols=cols)
                for side in (config.block_m, config.block_n, config.block_k):
                    assert side >= 16, "what tl.dot takes"
                    assert side & (side - 1) == 0, "a power of two"
                assert config.block_n < 2 * max(16, cols), "no tile has more than half of its columns empty"
                # The accumulator and two numbers for each of its elements, of 255 registers.
                assert 3 * config.block_m * config.block_n <= 192 * 32 * config.num_warps
    assert sweep_config(arch, torch.bfloat16, 64, rows=99, cols=98).block_k == 64, "a ViT's metric in one piece"
    assert sweep_config(arch, torch.float32, 64, rows=99, cols=98).block_k == 16, "exact products hold few rows"
