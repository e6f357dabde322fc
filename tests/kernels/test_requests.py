"""What may be asked: how a request is encoded for an operator, and what is said of one that makes no sense."""

from __future__ import annotations

import pytest
import torch

from pairtile.kernels import (
    AbovePositive,
    ColumnRange,
    Diagonal,
    DifferentId,
    HingeSum,
    LogSumExp,
    Paced,
    PairScore,
    SameId,
    SoftmaxMean,
    SoftplusSum,
    Target,
    Teacher,
    TopK,
    similarity_reduce,
    use_backend,
)
from pairtile.kernels.contrastive.plan import decode, encode
from pairtile.kernels.contrastive.reductions import Above, Chosen, Count, Hinge

N, M = 6, 7
ROW_IDS, COL_IDS, TARGETS = torch.arange(N), torch.arange(M), torch.arange(N) - 1
OVER_COLUMNS, OVER_ROWS = torch.rand(M), torch.rand(N)


def test_a_request_survives_its_encoding():
    thresholds = torch.zeros(N)
    rules = (Diagonal(-2), SameId(ROW_IDS, COL_IDS), DifferentId(ROW_IDS, COL_IDS), ColumnRange(3, 9), Target(TARGETS))
    above = (Above(thresholds, Diagonal(4)), Above(thresholds, Target(TARGETS)))
    teacher, other = (Teacher(torch.rand(N, 3), torch.rand(M, 3), torch.tensor(scale)) for scale in (1.0, 2.0))
    rows = (
        LogSumExp(rules, OVER_COLUMNS),
        SoftplusSum(None, above),
        PairScore(Target(TARGETS)),
        SoftmaxMean(under=teacher, exclude=rules),
        SoftmaxMean(other, teacher, -2.5, weights=OVER_COLUMNS),
        Hinge(thresholds, rules),
    )
    cols = (
        SoftplusSum(rules, above, OVER_ROWS),
        LogSumExp(),
        PairScore(Diagonal(7)),
        LogSumExp(of=Paced(32.0, -1.0, 1.25, 0.75)),
        LogSumExp(of=other),
        Count(OVER_COLUMNS, weights=OVER_ROWS),
        Chosen(3, rules, teacher),
    )
    numbers, factors, tensors = encode(rows, cols)
    taught = [each for one in (teacher, other) for each in (one.x, one.y, one.scale)]
    assert [id(each) for each in tensors] == [
        id(each) for each in (OVER_COLUMNS, ROW_IDS, COL_IDS, TARGETS, thresholds, *taught, OVER_ROWS)
    ], "each tensor once, in the order of first use"
    assert numbers[:11] == [1, 0, 0, 0, 5, -1, -1, -1, 0, -2, 0]
    assert factors == [-2.5, 0, 1, 0, 32, -1, 1.25, 0.75]
    decoded = decode(numbers, factors, tensors)
    assert [dim for dim, _ in decoded] == [1] * 6 + [0] * 7
    assert decoded[3][1].under is decoded[4][1].under is decoded[-1][1].of, "one object for each teacher"
    again = encode(tuple(each for dim, each in decoded if dim == 1), tuple(each for dim, each in decoded if dim == 0))
    assert again[:2] == (numbers, factors)
    assert [id(each) for each in again.tensors] == [id(each) for each in tensors]


def test_codes_from_elsewhere_are_refused():
    with pytest.raises(ValueError, match="no rule has the code 9"):
        decode([1, 0, -1, 0, 1, -1, -1, -1, 9, 0, 0], [], [])
    with pytest.raises(ValueError, match="no reduction has the kind 8"):
        decode([1, 8, -1, 0, 0, -1, -1, -1], [], [])
    with pytest.raises(TypeError, match="the operator resolves it"):
        encode((LogSumExp(AbovePositive()),), ())


# ---- errors -----------------------------------------------------------------------------------------------------

ID = torch.zeros(3, dtype=torch.int64)
BAD = [
    ({"rows": [LogSumExp(SameId(ID, ID.float()))]}, ValueError, r"SameId.cols is a torch.float32 .*expected an int64"),
    ({"rows": [LogSumExp(DifferentId(ID[:2], ID))]}, ValueError, r"DifferentId.rows .*\[2\].*\[3\], one for each row"),
    ({"rows": [LogSumExp(SameId(ID, [0, 0, 0]))]}, ValueError, r"SameId.cols is \[0, 0, 0\]"),
    ({"rows": [LogSumExp(SameId(ID, ID.to("meta")))]}, ValueError, "SameId.cols is on meta"),
    ({"rows": [LogSumExp(Target(ID + 3))]}, ValueError, "Target.columns holds 3, but y has 3 rows"),
    ({"rows": [PairScore(Target(ID[:1]))]}, ValueError, r"Target.columns is .*\[1\]"),
    ({"cols": [PairScore(Target(ID))]}, ValueError, r"PairScore\(Target\(...\)\) in a reduction of cols"),
    ({"cols": [LogSumExp(AbovePositive(0.0, Target(ID)))]}, ValueError, r"AbovePositive\(Target\(...\)\) in a red"),
    ({"rows": [TopK(0)]}, ValueError, r"TopK.k=0: expected a whole number from 1 to 1024"),
    ({"rows": [SoftmaxMean(sharpness=float("nan"))]}, ValueError, r"SoftmaxMean.sharpness=nan"),
    (
        {"rows": [SoftmaxMean(under=torch.eye(3))]},
        TypeError,
        r"(?s)SoftmaxMean is of tensor.*expected None for S, or a T",
    ),
    ({"rows": [LogSumExp(of=Teacher(torch.rand(2, 4), torch.rand(3, 4)))]}, ValueError, r"Teacher.x .*\[2, 4\]"),
    ({"rows": [LogSumExp(of=Teacher(torch.rand(3, 4), torch.rand(3, 5)))]}, ValueError, r"Teacher.x .* Teacher.y"),
    ({"cols": [HingeSum(0.2, Target(ID))]}, ValueError, r"HingeSum\(Target\(...\)\) in a reduction of cols"),
    ({"rows": [PairScore(ColumnRange(0, 1))]}, TypeError, r"PairScore.pair is ColumnRange"),
    ({"rows": [LogSumExp((Diagonal(), "diagonal"))]}, TypeError, "'diagonal' is no pair rule"),
    ({"rows": [SoftplusSum(3)]}, TypeError, "3 is no pair rule"),
    ({"rows": [LogSumExp(weights=torch.ones(4))]}, ValueError, r"weights of a reduction of rows is .*\[4\].*\[3\]"),
    ({"cols": [LogSumExp(weights=ID)]}, ValueError, "weights of a reduction of cols is a torch.int64"),
    ({"rows": LogSumExp()}, TypeError, r"rows is one LogSumExp: expected a list of them, rows=\[...\]"),
    ({"row_bias": torch.zeros(2)}, ValueError, r"row_bias is .*\[2\]: expected a floating point tensor of shape \[3\]"),
    ({"col_bias": 0.0}, ValueError, "col_bias is 0.0"),
    ({"scale": torch.zeros(3, 3)}, ValueError, r"scale is .*\[3, 3\]: .* or \[3\] for a temperature"),
    ({"precision": "bf16"}, ValueError, r"precision='bf16': the \w+ backend offers \"ieee\""),
]


@pytest.mark.parametrize(("change", "error", "said"), BAD, ids=[said for *_, said in BAD])
def test_errors_say_what_was_given(backend, change, error, said):
    arguments = {"scale": 1.0, "rows": [LogSumExp()]} | change
    with pytest.raises(error, match=said):
        similarity_reduce(torch.zeros(3, 4), torch.zeros(3, 4), **arguments)


def test_ieee_is_refused_where_torch_rounds_operands():
    x = torch.ones(2, 2)
    similarity_reduce(x, x, scale=1.0, rows=[LogSumExp()], precision="ieee")
    torch.set_float32_matmul_precision("high")
    try:
        with use_backend("torch"), pytest.raises(ValueError, match="torch may round the operands"):
            similarity_reduce(x, x, scale=1.0, rows=[LogSumExp()], precision="ieee")
    finally:
        torch.set_float32_matmul_precision("highest")
