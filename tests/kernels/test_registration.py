"""The operators inside torch.compile, opcheck and activation checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pairtile.kernels import (
    AbovePositive,
    ColumnRange,
    Diagonal,
    LogSumExp,
    PairScore,
    SameId,
    SoftplusSum,
    Target,
    similarity_reduce,
)
from pairtile.kernels.contrastive import compiled
from pairtile.kernels.contrastive.plan import encode
from pairtile.kernels.contrastive.reductions import Above


def every_reduction(offset: int) -> tuple:
    own = Diagonal(offset)
    return LogSumExp(), LogSumExp(own), SoftplusSum(own), SoftplusSum(None), PairScore(own)


def request_with_everything(n, m):
    """Reductions, rules, weights and biases of all kinds, as an operator takes them, in float32."""
    ids, weights = SameId(torch.arange(n) // 2, torch.arange(m) // 2), torch.rand(m)
    above = Above(torch.zeros(n), Diagonal())
    rows = (*every_reduction(-2), LogSumExp((ids, above), weights), SoftplusSum(ids, ColumnRange(1, 2)))
    leaves = [torch.randn(n, 4), torch.randn(m, 4), torch.rand(n), torch.rand(()), torch.randn(n), torch.randn(m)]
    return [leaf.requires_grad_() for leaf in leaves], encode(rows, every_reduction(1))


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("everything", [False, True])
def test_the_operators_for_torch_compile_are_registered_right(name, everything):
    if name == "triton":
        pytest.importorskip("triton")
    leaves, request = request_with_everything(7, 5)
    if not everything:
        leaves[2:] = [torch.tensor(2.0, requires_grad=True), None, None, None]
        request = encode((LogSumExp(Diagonal()), PairScore()), ())
    torch.library.opcheck(compiled._OPERATORS[name], (*leaves, *request, 1000, "ieee"))


@pytest.mark.parametrize("budget", [20_000, 64 << 20])  # some and all cosines kept for the backward
@pytest.mark.parametrize("everything", [False, True])
def test_the_cpp_operators_are_registered_right(cpp, everything, budget):
    leaves, request = request_with_everything(70, 50)
    if not everything:
        leaves[2:] = [torch.tensor(2.0, requires_grad=True), None, None, None]
        request = encode((LogSumExp(Diagonal()), PairScore()), ())
    torch.library.opcheck(torch.ops.pairtile.similarity_reduce.default, (*leaves, *request, budget))
    detached = [None if leaf is None else leaf.detach() for leaf in leaves]
    arguments = (*detached, *request, budget)
    forward, backward = torch.ops.pairtile.similarity_reduce_forward, torch.ops.pairtile.similarity_reduce_backward
    torch.library.opcheck(forward.default, (*arguments, False))
    # Between the rows that it keeps lies padding that nobody writes or reads, so two runs need not agree there.
    torch.library.opcheck(forward.default, (*arguments, True), test_utils=("test_schema", "test_faketensor"))
    *outputs, kept = forward(*arguments, True)
    count = len(outputs) // 2
    grads = [torch.randn(each.shape) for each in outputs[:count]]
    for wanted in ([leaf is not None for leaf in leaves], [False, True, False, False, False, False]):
        torch.library.opcheck(backward.default, (*arguments, outputs[count:], kept, grads, wanted))


@pytest.mark.parametrize("budget", [1, 1 << 20, 20 << 20, 40 << 20])
def test_what_is_kept_is_foretold_at_any_size(cpp, budget):
    """The cosines of 2300 x 5000 take 44 MiB: none of them, some and most fit."""
    arguments = (torch.randn(2300, 1), torch.randn(5000, 1), torch.tensor(1.0), None, None, None)
    request = encode((LogSumExp(),), ())
    forward = torch.ops.pairtile.similarity_reduce_forward.default
    torch.library.opcheck(forward, (*arguments, *request, budget, True), test_utils=("test_faketensor",))


def training_step(x, y, scale, row_bias, ids, targets):
    """Every kind of reduction and rule, traced together with what is around it."""
    n = x.shape[0]
    rows, cols = similarity_reduce(
        F.normalize(x, dim=-1),
        F.normalize(y, dim=-1),
        scale=scale.exp(),
        row_bias=row_bias,
        rows=[
            LogSumExp((SameId(ids, ids), AbovePositive(0.1))),
            PairScore(Target(targets)),
            LogSumExp(Target(targets)),
        ],
        cols=[SoftplusSum(AbovePositive(-0.1), ColumnRange(0, 2)), LogSumExp(weights=row_bias.detach().abs())],
    )
    return sum(each.masked_fill(each.isinf(), 0).sum() for each in (*rows, *cols)) / n


def test_torch_compile_of_every_rule(backend):
    torch.manual_seed(0)
    n = 12
    ids, targets = torch.arange(n) // 3, torch.randint(-1, n, (n,))
    leaves = [torch.randn(n, 5), torch.randn(n, 5), torch.tensor(1.0), torch.randn(n)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    plain = training_step(*leaves, ids, targets)
    compiled = torch.compile(training_step, fullgraph=True, backend="aot_eager")(*leaves, ids, targets)
    torch.testing.assert_close(compiled, plain)
    for given, expected in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves)):
        # The scores of a step that is compiled differ by a rounding, no pair is borderline by this choice of seed.
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_nothing(backend):
    torch.manual_seed(0)
    n = 12
    ids, targets = torch.arange(n) // 3, torch.randint(-1, n, (n,))
    leaves = [torch.randn(n, 5), torch.randn(n, 5), torch.tensor(1.0), torch.randn(n)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    plain = training_step(*leaves, ids, targets)
    replayed = checkpoint(training_step, *leaves, ids, targets, use_reentrant=False)
    assert torch.equal(plain, replayed)
    for given, expected in zip(torch.autograd.grad(replayed, leaves), torch.autograd.grad(plain, leaves)):
        assert torch.equal(given, expected)
