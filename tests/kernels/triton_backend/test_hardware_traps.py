"""What an interpreter shows of traps that a GPU would fall into: buffers, strides, infinities, settings of torch."""

from __future__ import annotations

import pytest
import torch

from pairtile.kernels import Diagonal, LogSumExp, PairScore, similarity_reduce, use_backend

pytest.importorskip("triton")

from pairtile.kernels.contrastive import compiled
from pairtile.kernels.contrastive.plan import encode
from pairtile.kernels.contrastive.triton_backward import panel_shape
from pairtile.kernels.contrastive.triton_kernels import launching


@pytest.mark.parametrize("n", [1, 8, 255, 4096, 100_000])
@pytest.mark.parametrize("m", [1, 300, 65_536, 20_000_000])
@pytest.mark.parametrize("budget", [64 << 20, 512 << 20])
def test_a_panel_of_whole_tiles_fits_the_budget(n, m, budget):
    for shape in (panel_shape(n, m, budget // 2), panel_shape(m, n, budget // 2)[::-1]):
        rows, cols = (-(-size // 256) * 256 for size in shape)
        assert rows * cols * 2 <= budget + 2 * 256 * (rows + cols)
        assert 256 * cols < 2**31, "offsets within a tile of the buffer take 32 bits"


def test_expanded_and_overlapping_rows_get_no_descriptor():
    base = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert launching.aligned(base, "sm90")
    assert not launching.aligned(base[:1].expand(4, 64), "sm90")
    assert not launching.aligned(base.as_strided((4, 64), (8, 1)), "sm90")
    assert not launching.aligned(base, "sm80")


def test_a_negated_view_counts_as_its_values():
    features = torch.view_as_complex(torch.randn(5, 8, 2)).conj().imag
    assert features.is_neg()
    with use_backend("triton"):
        (given,), _ = similarity_reduce(features, features, scale=1.0, rows=[LogSumExp()])
    with use_backend("reference"):
        (expected,), _ = similarity_reduce(features, features, scale=1.0, rows=[LogSumExp()])
    torch.testing.assert_close(given, expected)


def test_very_wide_features_of_16_bits():
    x, y = (torch.nn.functional.normalize(torch.randn(n, 200_000), dim=1).half() for n in (4, 5))
    with use_backend("triton"):
        (given,), _ = similarity_reduce(x, y, scale=100.0, rows=[LogSumExp()])
    expected = (100 * x.double() @ y.double().T).logsumexp(1)
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=0)  # 200,000 float32 sums of products


@pytest.mark.parametrize("columns", [3, 40 * 128])
def test_infinite_scores_give_an_infinite_result(columns):
    x, y = torch.ones(2, 1), torch.ones(columns, 1)
    y[0] = torch.inf
    bias = torch.zeros(columns)
    bias[-1] = 200.0
    with use_backend("triton"):
        for asked in (torch.full_like(y, torch.inf), y):
            (lse,), _ = similarity_reduce(x, asked, scale=1.0, col_bias=bias, rows=[LogSumExp()])
            assert (lse == torch.inf).all()


def test_own_pairs_beyond_an_edge_reach_no_bias():
    x, y = torch.randn(3, 4), torch.randn(5, 4)
    row_bias, col_bias = torch.zeros(3, requires_grad=True), torch.zeros(5, requires_grad=True)
    with use_backend("triton"):
        _, (scores,) = similarity_reduce(
            x, y, scale=1.0, row_bias=row_bias, col_bias=col_bias, cols=[PairScore(Diagonal())]
        )
        by_row, by_col = torch.autograd.grad(scores, (row_bias, col_bias), torch.full((5,), 2.0))
    assert by_row.tolist() == [2, 2, 2]
    assert by_col.tolist() == [2, 2, 2, 0, 0]


def test_the_registered_operator_says_its_strides_right():
    x, y = torch.randn(8, 6).T.requires_grad_(), torch.randn(9, 8).requires_grad_()
    operands = (x, y, torch.tensor(2.0), None, None, None)
    request = encode((LogSumExp(Diagonal()),), ())
    torch.library.opcheck(compiled._OPERATORS["triton"], (*operands, *request, 1 << 20, "ieee"))


def test_the_newer_switch_of_torch_for_tf32_is_understood():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x = torch.randn(3, 4)
    try:
        for value in ("tf32", "ieee"):
            matmul.fp32_precision = value
            with use_backend("triton"):
                similarity_reduce(x, x, scale=1.0, rows=[LogSumExp()])
    finally:
        matmul.fp32_precision = before
