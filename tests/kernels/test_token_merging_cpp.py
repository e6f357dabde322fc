"""The C++ kernels of token merging where they differ in their ways: tiles, threads, strides, 16-bit tokens, NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import token_merging as papers
import torch
import torch.nn.functional as F
from contenders import portable_product, threads
from token_maps import assert_both_maps_round_once
from torch import Tensor

from pairtile.kernels import use_backend
from pairtile.kernels.token_merging import Matching, bipartite_matching, complete_graph_matching, merge_tokens
from pairtile.kernels.token_merging.combine import combine, spread
from pairtile.kernels.token_merging.similarity import TORCH, Partners, best_partners, energies

pytestmark = pytest.mark.usefixtures("cpp")


@pytest.fixture(params=[False, True], ids=["brgemm", "portable"])
def product(request: pytest.FixtureRequest) -> Iterator[None]:
    with portable_product(request.param):
        yield


def small_integers(*shape: int) -> Tensor:
    """Products of these are exact in any order, and many are equal."""
    return torch.randint(-2, 3, shape).float()


# ---- partners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partners", Partners)
@pytest.mark.parametrize(("tokens", "width"), [(1, 3), (2, 16), (67, 1), (130, 5), (65, 1030)])
def test_partners_are_the_first_of_the_best(product, partners, tokens, width):
    x = small_integers(3, tokens, width)
    others = small_integers(3, max(1, tokens - 3), width) if partners == Partners.ALL else x
    x_keep, y_keep = torch.rand(3, tokens) < 0.8, torch.rand(3, others.shape[1]) < 0.8
    y_keep[1] = False
    for masks in ((None, None), (x_keep, y_keep)):
        best, index = best_partners(x, others, x_keep=masks[0], y_keep=masks[1], partners=partners)
        right, right_index = TORCH.best_partners(x, others, *masks, partners, 1 << 30)
        assert torch.equal(best, right)
        assert torch.equal(index, right_index)


def test_partners_of_tokens_as_they_lie():
    wide = small_integers(2, 150, 24)
    for x, y in (
        (wide[:, ::2], wide[:, 1::2]),
        (wide[..., 3:11], wide[..., 3:11]),
        (wide.transpose(0, 1)[:5], wide.transpose(0, 1)[-5:]),
        (wide.mT, wide.mT),
        (wide[:1].expand(2, -1, -1), wide),
        (wide[:, :1].expand(-1, 9, -1), wide),
    ):
        found, right = best_partners(x, y), TORCH.best_partners(x, y, None, None, 0, 1 << 30)
        assert all(torch.equal(*each) for each in zip(found, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_partners_of_16_bit_tokens_by_their_exact_products(dtype):
    x, y = torch.randn(2, 70, 19).to(dtype), torch.randn(2, 90, 19).to(dtype)
    best, index = best_partners(x, y)
    scores = x.double() @ y.double().mT
    torch.testing.assert_close(best.double(), scores.amax(-1), atol=1e-5, rtol=0)  # 19 products in float32
    assert torch.equal(index, scores.argmax(-1))


def test_two_tokens_that_want_each_other_see_one_similarity(product):
    x = F.normalize(torch.randn(2, 200, 600), dim=-1)
    best, index = best_partners(x, x, partners=Partners.OTHERS)
    mutual = index.gather(1, index) == torch.arange(200)
    assert mutual.any()
    assert torch.equal(best[mutual], best.gather(1, index)[mutual])


def test_nothing_to_choose_from():
    x = torch.randn(2, 5, 4)
    for best, index in (best_partners(x, x[:, :0]), best_partners(x, x, x_keep=torch.zeros(2, 5, dtype=torch.bool))):
        assert (best == -torch.inf).all()
        assert not index.any()
    assert best_partners(x[:0], x[:0])[0].shape == (0, 5)
    assert best_partners(x[:, :0], x)[1].shape == (2, 0)


# ---- ToMe's matching in one call --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("class_token", "distill_token"), [(False, False), (True, False), (True, True), (False, True)])
def test_tome_over_several_tiles_of_equals(dtype, class_token, distill_token):
    metric = torch.randint(0, 2, (2, 139, 16)) * 2.0 - 1
    given = metric.to(dtype).repeat(1, 1, 2)[..., 8:24]  # the same cosines, channels of a wider tensor
    for r in (1, 20, 69):
        for backend in ("cpp", "torch"):
            with use_backend(backend):
                found = bipartite_matching(given, r, class_token, distill_token)
            right = papers.tome(given, r, class_token, distill_token)
            for each, expected in zip((found.kept, found.sources, found.places), right, strict=True):
                assert each.tolist() == expected


@pytest.mark.parametrize(("class_token", "distill_token"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("tokens", "width"), [(64, 5), (131, 64), (197, 64)])
def test_tome_from_nothing_to_the_maximum_where_float64_tells_candidates_apart(
    tokens, width, class_token, distill_token
):
    """Several strips and tiles; similarities as close as float32's rounding of 64 products may go either way."""
    metric = next(each for each in (torch.randn(1, tokens, width) for _ in range(200)) if tome_is_told(each))
    for r in (0, 1, 8, (tokens - 2) // 2, tokens):
        found = bipartite_matching(metric, r, class_token, distill_token)
        right = papers.tome(metric, r, class_token, distill_token)
        for each, expected in zip((found.kept, found.sources, found.places), right, strict=True):
            assert each.tolist() == expected


def tome_is_told(metric: Tensor) -> bool:
    """Each even token's two best partners, with token 1 or without, and all best ones, are apart in float64."""
    scores = papers.cosines(metric)[0, ::2, 1::2]
    for allowed in (scores, scores[:, 1:]):
        best = allowed.topk(2, dim=1).values
        if min((best[:, 0] - best[:, 1]).min(), best[:, 0].sort().values.diff().min()) < 1e-6:
            return False
    return True


def test_registers_and_special_tokens_as_without_the_call():
    metric = torch.randint(0, 2, (2, 41, 16)) * 2.0 - 1
    for protected in (1, 2, 5, 39):
        for distill in (False, True):
            found = bipartite_matching(metric, 30, False, distill, protected=protected)
            with use_backend("torch"):
                right = bipartite_matching(metric, 30, False, distill, protected=protected)
            for name in ("kept", "sources", "places"):
                assert torch.equal(getattr(found, name), getattr(right, name))


@pytest.mark.parametrize("where", [(0, 4), (0, 5), (slice(None), slice(None))])
def test_nan_harms_no_index(where):
    metric = torch.randn(2, 30, 8)
    metric[where] = torch.nan
    guide = metric[..., 0]
    for matching in (bipartite_matching(metric, 7, True), complete_graph_matching(metric, 7, guide)):
        tokens = torch.cat([matching.kept, matching.sources], 1).sort(1).values
        assert torch.equal(tokens, torch.arange(30).expand(2, -1))
        merge_tokens(metric, matching)


# ---- energies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "width", "margin"), [(1, 4, 0.5), (66, 7, -0.4), (200, 64, 0.9), (33, 3, 90.0)])
def test_energies_against_float64(product, tokens, width, margin):
    x = F.normalize(torch.randn(3, tokens, width), dim=-1)
    x[:, -1] = x[:, 0]
    found = energies(x, margin, 0.7)
    right = F.elu(x.double() @ x.double().mT - margin, alpha=0.7).mean(-1)
    # Rounding of float32 products and of f, some numbers of at most 1; of the largest margins relative to alpha.
    torch.testing.assert_close(found.double(), right, atol=5e-7, rtol=0)
    assert torch.equal(found[:, -1], found[:, 0]), "equal tokens have equal energies, whose order is by position"


def test_energies_keep_nan_and_small_differences():
    x = torch.tensor([[[1.0, 0.0], [1.0, 1e-6], [torch.nan, 0.0]]])
    assert energies(x, 1.0, 1.0).isnan().all()
    # f near 0, where exp(v) - 1 would be off by 6%.
    small = torch.tensor([[[1.0]]]) * (1 - 5e-7)
    torch.testing.assert_close(energies(small, 1.0, 1.0).double(), torch.expm1(small.double().square() - 1)[..., 0])


# ---- merging ----------------------------------------------------------------------------------------------------------


def some_matching(batch: int, tokens: int, merged: int, one_place: bool = False) -> Matching:
    order = torch.rand(batch, tokens).argsort(1)
    kept, sources = order[:, merged:], order[:, :merged]
    places = torch.randint(1 if one_place else tokens - merged, sources.shape)
    return Matching(kept, sources, places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("one_place", [False, True])
def test_both_maps_round_once(dtype, one_place):
    # More than one task, and channels behind the last whole vector.
    assert_both_maps_round_once(some_matching(2, 90, 40, one_place), 90, 777, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_exceeds_the_caches_goes_past_them_bit_by_bit(dtype):
    """Above 32 MiB stores are others, for rows of whole cache lines at an aligned address."""
    tokens, merged, width = 9001, 500, 32 * (64 if dtype == torch.bfloat16 else 32)
    x = torch.randn(1, tokens, width).to(dtype)
    matching = some_matching(1, tokens, merged)
    size = torch.randint(1, 5, (1, tokens)).float()
    total = size.gather(1, matching.kept).scatter_add(1, matching.places, size.gather(1, matching.sources))
    whole = combine(x, matching, size, total)
    parts = torch.cat([combine(each, matching, size, total) for each in x.split(width // 4, dim=-1)], -1)
    assert torch.equal(whole, parts)
    upstream = torch.cat([spread(each, matching) for each in whole.split(width // 4, dim=-1)], -1)
    assert torch.equal(spread(whole, matching), upstream)


def test_an_upstream_gradient_without_memory_of_its_own():
    x = torch.randn(2, 9, 5, requires_grad=True)
    (found,) = torch.autograd.grad(combine(x, some_matching(2, 9, 4), None, None).sum(), x)
    assert torch.equal(found, torch.ones_like(x))


def test_empty_batches_and_tokens_without_channels():
    for shape in ((0, 7, 4), (2, 7, 0)):
        x = torch.randn(shape)
        assert combine(x, some_matching(shape[0], 7, 3), None, None).shape == (shape[0], 4, shape[2])


def test_indices_of_no_token_are_refused():
    x = torch.randn(1, 4, 3)
    kept, sources, places = torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), torch.tensor([[0, 1]])
    for broken in (Matching(kept + 3, sources, places), Matching(kept, sources, places - 1)):
        with pytest.raises(IndexError, match="is not one of"):
            combine(x, broken, None, None)
    with pytest.raises(RuntimeError, match=r"expected int64 indices of 1 samples"):
        combine(x, Matching(kept.int(), sources, places), None, None)


# ---- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_no_bit(batch):
    x, tokens = torch.randn(batch, 300, 48), torch.randn(batch, 300, 500)

    def everything() -> list[Tensor]:
        unit = F.normalize(x, dim=-1)
        matching = bipartite_matching(x, 60, True)
        merged, sizes = merge_tokens(tokens, matching)
        later = best_partners(unit, unit, partners=Partners.LATER)
        found = [matching.kept, matching.sources, matching.places, merged, sizes, energies(unit, 0.2, 1.0), *later]
        return [*found, spread(merged, matching)]

    with threads(1):
        one = everything()
    with threads(2):
        two = everything()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
