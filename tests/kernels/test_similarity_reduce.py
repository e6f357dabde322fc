"""`similarity_reduce`: every backend against the dense formula, its edges, its memory and its errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pairtile.kernels import (
    Diagonal,
    LogSumExp,
    PairScore,
    SoftplusSum,
    similarity_reduce,
    use_backend,
    use_memory_budget,
)
from pairtile.kernels.contrastive.torch_elementwise import exp_


def every_reduction(offset: int) -> tuple:
    own = Diagonal(offset)
    return LogSumExp(), LogSumExp(own), SoftplusSum(own), SoftplusSum(None), PairScore(own)


def results_and_gradients(x, y, scale, bias, offset, **options):
    """All reductions both ways, and the gradients of a fixed random combination of their finite entries."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, y, scale, bias)]
    reductions = every_reduction(offset)
    rows, cols = similarity_reduce(
        leaves[0], leaves[1], scale=leaves[2], bias=leaves[3], rows=reductions, cols=reductions, **options
    )
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=rows[0].dtype)
    for result in (*rows, *cols):
        weights = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
        total = total + (torch.where(result.isinf(), 0, result) * weights).sum()
    return [*rows, *cols], torch.autograd.grad(total, leaves)


SHAPES = [(37, 23, 3), (5, 50, -2), (1, 1, 0), (1, 1, 4), (0, 3, 0), (3, 0, 0), (0, 0, 0), (40, 40, 0), (3, 4, 100)]


@pytest.mark.parametrize("budget", [1, 3000, None])
@pytest.mark.parametrize(("n", "m", "offset"), SHAPES)
def test_every_reduction_equals_the_dense_formula(backend, dtype, embeddings, n, m, offset, budget):
    inputs = [each.to(dtype) for each in (*embeddings(n, m, 5), torch.tensor(3.0), torch.tensor([-0.5]))]
    results, gradients = results_and_gradients(*inputs, offset, memory_budget=budget)
    with use_backend("reference"):
        expected, expected_gradients = results_and_gradients(*(each.double() for each in inputs), offset)
    # float64: only the order of summation differs. float32: sums of up to 50 terms of size 1, which may cancel.
    rtol, atol = (1e-11, 1e-12) if dtype == torch.float64 else (3e-6, 3e-5)
    for given, truth in zip([*results, *gradients], [*expected, *expected_gradients]):
        torch.testing.assert_close(given.double(), truth, rtol=rtol, atol=atol)


def test_the_dense_formula_itself(embeddings):
    """The oracle against sums written out pair by pair."""
    x, y = embeddings(4, 6, 3)
    logits = [[2.0 * sum(a * b for a, b in zip(u, v)) + 0.3 for v in y.tolist()] for u in x.tolist()]
    with use_backend("reference"):
        rows, cols = similarity_reduce(x, y, scale=2.0, bias=0.3, rows=every_reduction(1), cols=every_reduction(1))
    s = torch.tensor(logits, dtype=torch.float64)
    for i in range(4):
        torch.testing.assert_close(rows[0][i], s[i].exp().sum().log())
        torch.testing.assert_close(rows[1][i], (s[i].exp().sum() - s[i, i + 1].exp()).log())
        torch.testing.assert_close(rows[2][i], (1 + s[i].exp()).log().sum() - s[i, i + 1])
        torch.testing.assert_close(rows[3][i], (1 + s[i].exp()).log().sum())
        torch.testing.assert_close(rows[4][i], s[i, i + 1])
    for j in range(6):
        paired = 1 <= j <= 4
        own = s[j - 1, j] if paired else torch.tensor(-torch.inf, dtype=torch.float64)
        torch.testing.assert_close(cols[1][j], (s[:, j].exp().sum() - own.exp()).log())
        torch.testing.assert_close(cols[2][j], (1 + s[:, j].exp()).log().sum() - (own if paired else 0))
        torch.testing.assert_close(cols[4][j], own)


def test_gradcheck(backend, dtype, embeddings):
    if dtype != torch.float64:
        pytest.skip("finite differences need float64")
    x, y = embeddings(5, 4, 3)
    scale, bias = torch.tensor(2.5, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    reductions = every_reduction(0)[:4]

    def sweep(x, y, scale, bias):
        rows, cols = similarity_reduce(x, y, scale=scale, bias=bias, rows=reductions, cols=reductions, memory_budget=1)
        return *rows, *cols

    assert torch.autograd.gradcheck(sweep, [tensor.requires_grad_() for tensor in (x, y, scale, bias)])


@pytest.mark.parametrize("wanted", [pair for n in (1, 2) for pair in itertools.combinations(range(4), n)])
def test_gradients_of_some_inputs_only(backend, dtype, embeddings, wanted):
    tensors = [each.to(dtype) for each in (*embeddings(7, 9, 3), torch.tensor(2.0), torch.tensor(0.1))]
    _, expected = results_and_gradients(*tensors, 0)
    leaves = [tensor.clone().requires_grad_(k in wanted) for k, tensor in enumerate(tensors)]
    reductions = every_reduction(0)
    rows, cols = similarity_reduce(
        leaves[0], leaves[1], scale=leaves[2], bias=leaves[3], rows=reductions, cols=reductions
    )
    generator = torch.Generator().manual_seed(5)
    total = 0
    for result in (*rows, *cols):
        weights = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(dtype)
        total = total + (torch.where(result.isinf(), 0, result) * weights).sum()
    total.backward()
    for k, leaf in enumerate(leaves):
        if k in wanted:
            # The same sums; an implementation may take another path where nothing else is wanted.
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(leaf.grad, expected[k], rtol=tolerance, atol=tolerance)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_features_lose_nothing_beyond_their_own_rounding(backend, embeddings, relative_error, dtype):
    x, y = (tensor.to(dtype) for tensor in embeddings(150, 130, 33))
    scale, bias = torch.tensor(20.0), torch.tensor([-3.0])
    results, gradients = results_and_gradients(x, y, scale, bias, 0, memory_budget=20_000)
    with use_backend("reference"):
        expected, expected_gradients = results_and_gradients(x.double(), y.double(), scale.double(), bias.double(), 0)
    for given, truth in zip(results, expected):
        assert given.dtype == torch.float32
        finite = truth.isfinite()
        # float32 accumulation and statistics.
        assert relative_error(given[finite], truth[finite]) < 2e-6
    # dx and dy are rounded once, to half an eps at most; dscale and dbias, in float32, pass through zero. cpp rounds
    # the weights that multiply the features too, and dscale comes from that product; random errors average out.
    of_scale = torch.finfo(dtype).eps / 8 if backend == "cpp" else 1e-5
    for given, truth, rounding in zip(gradients, expected_gradients, (*[torch.finfo(dtype).eps] * 2, of_scale, 1e-5)):
        assert relative_error(given, truth) < rounding
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype, torch.float32, torch.float32]


def test_a_row_without_allowed_pair_is_minus_infinity_with_gradient_zero(backend):
    x = torch.randn(1, 4, requires_grad=True)
    y = torch.randn(1, 4, requires_grad=True)
    (lse,), (lse_of_column,) = similarity_reduce(
        x, y, scale=5.0, rows=[LogSumExp(Diagonal())], cols=[LogSumExp(Diagonal())]
    )
    assert lse.item() == lse_of_column.item() == -torch.inf
    (lse.sum() + lse_of_column.sum()).backward()
    assert x.grad.abs().sum() == 0
    assert y.grad.abs().sum() == 0


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(backend, embeddings, relative_error, size):
    x, y = embeddings(20, 20, 8)
    x, y = x.float(), y.float()
    scale, bias = torch.tensor(size), torch.tensor(size)
    results, gradients = results_and_gradients(x, y, scale, bias, 0, memory_budget=2000)
    with use_backend("reference"):
        expected, _ = results_and_gradients(x.double(), y.double(), scale.double(), bias.double(), 0)
    assert all(gradient.isfinite().all() for gradient in gradients)
    for given, truth in zip(results, expected):
        # The logits themselves carry a relative error of a few 1e-7.
        assert relative_error(given, truth, size=1.0) < 2e-6


def test_scores_far_below_the_largest_are_neither_lost_nor_slow(backend, embeddings, relative_error):
    x, y = (tensor.float() for tensor in embeddings(30, 30, 8))
    scale, bias = torch.tensor(400.0), torch.tensor(0.0)
    _, gradients = results_and_gradients(x, y, scale, bias, 0)
    with use_backend("reference"):
        _, expected = results_and_gradients(x.double(), y.double(), scale.double(), bias.double(), 0)
    for given, truth in zip(gradients, expected):
        # The scores carry a relative error of 1e-7, and they are exponents of size 400.
        assert relative_error(given, truth, size=1.0) < 400 * 2e-7
    # A number that underflows, in exp above all, costs ten times as much as any other.
    for dtype in (torch.float32, torch.float64):
        exponentials = exp_(torch.tensor([0.0, -800.0, -torch.inf, torch.inf, torch.nan], dtype=dtype))
        assert exponentials[0] == 1
        assert (torch.finfo(dtype).tiny <= exponentials[1:3]).all()
        assert (exponentials[1:3] < 2 * torch.finfo(dtype).tiny).all()
        assert exponentials[3].isinf()
        assert exponentials[4].isnan()


def test_a_row_of_infinitely_low_scores_is_minus_infinity(backend):
    (lse, without_pair), _ = similarity_reduce(
        torch.ones(2, 1), torch.full((3, 1), -torch.inf), scale=1.0, rows=[LogSumExp(), LogSumExp(Diagonal())]
    )
    assert lse.tolist() == without_pair.tolist() == [-torch.inf] * 2


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2.5e-7), (torch.float64, 5e-16)])
def test_softplus_has_every_digit_at_any_size(backend, dtype, bound):
    scores = torch.linspace(-80, 80, 2001 if backend == "triton" else 20001, dtype=dtype)
    _, (losses,) = similarity_reduce(
        torch.ones(1, 1, dtype=dtype), scores[:, None], scale=1.0, cols=[SoftplusSum(positive=None)]
    )
    truth = scores.double().clamp(min=0) + torch.log1p(scores.double().abs().neg().exp())
    # cpp: its vectorised exponential is good to two units in the last place.
    bounds = torch.full_like(truth, bound * (2 if backend == "cpp" else 1))
    if backend == "triton":  # its scores are kept in base 2: a factor log2(e), and a product, that are rounded
        bounds += scores.abs() * torch.finfo(torch.float32).eps
    assert ((losses - truth).abs() / truth < bounds).all()
    limits = torch.tensor([[torch.inf], [torch.nan], [-torch.inf]], dtype=dtype)
    _, (losses,) = similarity_reduce(torch.ones(1, 1, dtype=dtype), limits, scale=1.0, cols=[SoftplusSum(None)])
    assert losses[0] == torch.inf
    assert losses[1].isnan()
    assert losses[2] < 1e-37


def test_nan_is_not_hidden(backend):
    x = torch.randn(6, 4)
    x[2, 1] = torch.nan
    (lse, _, positives, _, _), (lse_of_column, *_) = similarity_reduce(
        x, torch.randn(5, 4), scale=1.0, rows=every_reduction(0), cols=every_reduction(0)
    )
    assert lse.isnan().tolist() == positives.isnan().tolist() == [False, False, True, False, False, False]
    assert lse_of_column.isnan().all()


def test_strides_do_not_matter(backend, dtype, embeddings):
    x, y, scale, bias = (each.to(dtype) for each in (*embeddings(24, 18, 7), torch.tensor(2.0), torch.tensor(0.5)))
    expected = results_and_gradients(x, y, scale, bias, 0, memory_budget=3000)
    strided_y = torch.zeros(36, 7, dtype=dtype)
    strided_y[::2] = y
    reductions = every_reduction(0)
    leaves = [x.T.contiguous().T.requires_grad_(), strided_y[::2].requires_grad_()]
    assert not any(leaf.is_contiguous() for leaf in leaves)
    rows, cols = similarity_reduce(*leaves, scale=scale, bias=bias, rows=reductions, cols=reductions)
    for given, truth in zip([*rows, *cols], expected[0]):
        torch.testing.assert_close(given, truth)
    expanded = rows[0].sum().expand(3).sum()  # a gradient of stride 0 comes back
    expanded.backward()
    assert leaves[0].grad.isfinite().all()


def test_autocast_does_not_round_the_products(backend, embeddings):
    x, y = (tensor.float().requires_grad_() for tensor in embeddings(20, 20, 16))
    (plain,), _ = similarity_reduce(x, y, scale=30.0, rows=[LogSumExp()])
    expected = torch.autograd.grad(plain.sum(), x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (lse,), _ = similarity_reduce(x, y, scale=30.0, rows=[LogSumExp()])
    assert lse.dtype == torch.float32
    assert torch.equal(lse, plain)
    assert torch.equal(torch.autograd.grad(lse.sum(), x)[0], expected)


def test_a_second_derivative_is_refused_clearly(backend, dtype, embeddings):
    x, y = (tensor.to(dtype).requires_grad_() for tensor in embeddings(4, 4, 3))
    (lse,), _ = similarity_reduce(x, y, scale=2.0, rows=[LogSumExp()])
    (gradient,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    if backend == "reference":
        gradient.sum().backward()
        return
    with pytest.raises(RuntimeError, match=f"cannot be differentiated twice on the {backend} backend"):
        gradient.sum().backward()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements in any new storage."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return result


def test_one_block_of_logits_at_most(embeddings):
    n, m, d, budget = 700, 900, 16, 400_000
    x, y = (tensor.float().requires_grad_() for tensor in embeddings(n, m, d))
    reductions = every_reduction(0)
    with use_backend("torch"), LargestTensor() as largest:
        rows, cols = similarity_reduce(x, y, scale=2.0, rows=reductions, cols=reductions, memory_budget=budget)
        sum(torch.where(each.isinf(), 0, each).sum() for each in (*rows, *cols)).backward()
    # The features are the largest tensors otherwise, and they are smaller than a block by this choice of sizes.
    assert m * d < largest.elements <= budget // 4 < n * m / 6


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"x has shape \[3\]: expected two dimensions"),
        ({"y": torch.zeros(3, 5)}, ValueError, r"x \[3, 4\] and y \[3, 5\] differ"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, r"x is torch.int64"),
        ({"y": [[1.0]]}, TypeError, "y is list"),
        ({"x": torch.zeros(3, 4, device="meta")}, ValueError, "x is on meta, y on cpu"),
        ({"scale": torch.zeros(2)}, ValueError, r"scale is a torch.float32 tensor of shape \[2\]: .* or \[3\]"),
        ({"bias": torch.zeros(1, 1)}, ValueError, "bias is"),
        ({"rows": ["lse"]}, TypeError, "rows holds 'lse'"),
        ({"memory_budget": 0}, ValueError, "memory_budget=0"),
    ],
)
def test_errors_say_what_was_given(change, error, said):
    arguments = {"x": torch.zeros(3, 4), "y": torch.zeros(3, 4), "scale": 1.0, "rows": [LogSumExp()]} | change
    with pytest.raises(error, match=said):
        similarity_reduce(arguments.pop("x"), arguments.pop("y"), **arguments)


def test_nothing_at_all(backend):
    (lse,), () = similarity_reduce(torch.zeros(3, 0), torch.zeros(0, 0), scale=1.0, rows=[LogSumExp()])
    assert lse.tolist() == [-torch.inf] * 3


def test_reductions_may_come_from_a_generator(backend):
    rows, cols = similarity_reduce(torch.zeros(3, 2), torch.zeros(2, 2), scale=1.0, rows=(LogSumExp() for _ in "ab"))
    assert (len(rows), len(cols)) == (2, 0)


def test_features_of_two_dtypes_meet_in_the_wider(backend):
    x, y = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(5, 3, dtype=torch.float64)
    (lse,), _ = similarity_reduce(x, y, scale=1.0, rows=[LogSumExp()])
    assert lse.dtype == torch.float64
    torch.testing.assert_close(lse, torch.logsumexp(x.double() @ y.T, 1))


def test_very_wide_embeddings(backend, embeddings, relative_error):
    # One chunk of D is like any other, and the interpreter takes a millisecond for each.
    x, y = (tensor.float() for tensor in embeddings(4, 5, 3_001 if backend == "triton" else 200_000))
    scale, bias = torch.tensor(9.0), torch.tensor(0.5)
    results, gradients = results_and_gradients(x, y, scale, bias, 0, memory_budget=1_000_000)
    with use_backend("reference"):
        expected, expected_gradients = results_and_gradients(x.double(), y.double(), scale.double(), bias.double(), 0)
    for given, truth in zip([*results, *gradients], [*expected, *expected_gradients]):
        # float32 accumulation; a sum that passes through zero is measured against the size of its terms, about 1.
        finite = truth.isfinite()
        assert relative_error(given[finite], truth[finite], size=1.0) < 2e-6


def test_the_budget_of_a_block(backend, embeddings, dtype):
    """`use_memory_budget` is what memory_budget is; blocks nest, and the call's own wins."""
    x, y = (each.to(dtype) for each in embeddings(70, 90, 8))
    asked = {"scale": 5.0, "rows": [LogSumExp()], "cols": [LogSumExp()]}
    by_argument = similarity_reduce(x, y, memory_budget=20_000, **asked)
    with use_memory_budget(1), use_memory_budget(20_000):
        by_block = similarity_reduce(x, y, **asked)
    with use_memory_budget(1):
        by_call = similarity_reduce(x, y, memory_budget=20_000, **asked)
    for found in (by_block, by_call):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(by_argument, found, strict=True))
    with pytest.raises(ValueError, match="memory_budget=0: expected a positive number"), use_memory_budget(0):
        pass
