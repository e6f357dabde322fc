"""Losses over token sets against the papers' formulas, pair by pair in float64: value and every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import late_losses as reference
from late_loss_cases import LOSSES, OVER_RANKS, Batch, batch
from pairtile.kernels import (
    ClipLoss,
    ColbertLoss,
    FilipLoss,
    LateDistillationLoss,
    MultiPositiveLoss,
    SigLipLoss,
    TripletLoss,
    maxsim,
    over_scores,
    use_backend,
)
from two_ranks import on_two_ranks

WORKER = Path(__file__).with_name("late_losses_worker.py")


def complete(b: Batch, *, candidates: bool) -> Tensor:
    """bool [n]: the rows that a loss keeps."""
    present = b.x_mask.any(1)
    return present & (b.negative_mask.any(2).all(1) if candidates else b.y_mask.any(1))


def differentiated(function, b: Batch, scale: float, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    b = b.to(dtype)
    leaves = [*b.leaves(), torch.tensor(scale, dtype=dtype, requires_grad=True)]
    value = function(b, leaves[-1])
    value.backward()
    return value.detach(), [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_paper(name, backend, dtype):
    loss = LOSSES[name]
    b = batch(6, empty=True)
    kept = complete(b, candidates=name in ("distillation", "margin_mse"))
    ours = loss.make()
    value, gradients = differentiated(lambda b, scale: loss.call(ours, b, scale), b, 5.0, dtype)
    with use_backend("reference"):
        truth, expected = differentiated(lambda b, scale: loss.terms(b.rows(kept), scale).mean(), b, 5.0, torch.float64)
    # float32: the products' rounding, 6e-8 of scores up to 25, in a difference of scores.
    close = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(value.double(), truth, **close)
    for given, right in zip(gradients, expected):
        torch.testing.assert_close(given.double(), right, **close)
    assert ours.dropped_pairs == int((~kept).sum()) > 0


@pytest.mark.parametrize("name", ["colbert", "colbert_own", "colbert_all", "colbert_pairwise"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_blocks_of_queries_give_what_the_whole_gives(name, reduction):
    loss, b = LOSSES[name], batch(7, empty=True)
    whole, blocks = (loss.make(reduction=reduction, query_block=block) for block in (None, 3))
    expected = differentiated(lambda b, scale: loss.call(whole, b, scale), b, 5.0, torch.float64)
    given = differentiated(lambda b, scale: loss.call(blocks, b, scale), b, 5.0, torch.float64)
    torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-12)
    assert blocks.dropped_pairs == whole.dropped_pairs == 2


def test_terms_are_given_for_each_pair():
    for name, loss in LOSSES.items():
        b, scale = batch(6, empty=True), torch.tensor(3.0, dtype=torch.float64)
        kept = complete(b, candidates=name in ("distillation", "margin_mse"))
        terms = loss.call(loss.make(reduction="none"), b, scale)
        assert not terms[~kept].any(), name
        torch.testing.assert_close(terms[kept], loss.terms(b.rows(kept), scale), rtol=1e-10, atol=1e-11)


def test_single_pairs_single_tokens_and_nothing_left():
    b = batch(1, x_length=1, y_length=1)
    assert FilipLoss()(b.x, b.y, 10.0).item() == 0.0
    assert ColbertLoss()(b.x, b.y, 10.0).item() == 0.0
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    x = torch.randn(3, 4, 5, requires_grad=True)
    for loss in (FilipLoss(), ColbertLoss(), ColbertLoss(query_block=2)):
        assert loss(x, x, 1.0, nothing).isnan()
        assert loss.dropped_pairs == 3
    dropped = ColbertLoss(reduction="sum")
    dropped(x, x, 1.0, nothing).backward()
    assert not x.grad.any()
    assert FilipLoss(reduction="sum")(x[:, :0], x, 1.0).item() == 0.0


def test_well_aligned_pairs_do_not_cancel():
    # At scale 100 the softmax of the positive is 1 - 1e-20: log_softmax would give 0, and a gradient of 0.
    b = batch(4)
    x, y = b.x.float().nan_to_num(), b.x.float().nan_to_num()
    for loss in (FilipLoss(), ColbertLoss(normalize_scores=True)):
        values = []
        for dtype in (torch.float32, torch.float64):
            leaf = x.to(dtype, copy=True).requires_grad_()
            loss(leaf, y.to(dtype), 100.0, b.x_mask, b.x_mask).backward()
            values.append(leaf.grad.double())
        # Relative to gradients of 1e-9 and less: scores of 100 rounded to 4e-6.
        assert 0 < values[1].abs().max() < 1e-4
        assert (values[0] - values[1]).norm() < 1e-4 * values[1].norm()


@pytest.mark.parametrize("make", [FilipLoss, ColbertLoss, lambda: ColbertLoss(query_block=2)])
def test_sixteen_bits_in_float32_out(make):
    b = batch(5)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x, y = (each.nan_to_num().bfloat16().to(dtype, copy=True).requires_grad_() for each in (b.x, b.y))
        loss = make()(x, y, 3.0, b.x_mask, b.y_mask)
        loss.backward()
        assert x.grad.dtype == dtype
        results.append((loss.detach(), x.grad, y.grad))
    assert results[0][0].dtype == torch.float32
    # Gradients are rounded to 8 bits; in blocks, those of each block and their sum.
    torch.testing.assert_close([each.double() for each in results[0]], list(results[1]), rtol=2**-7, atol=2**-12)


def test_blocks_are_not_differentiated_twice():
    x = torch.randn(3, 2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(ColbertLoss(query_block=2)(x, x.detach()), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_documents_beside_the_pairs():
    """As colpali-engine has it: more documents than queries, whose own begin at an offset."""
    b = batch(6, empty=True)
    scale = torch.tensor(2.0, dtype=torch.float64)
    given = ColbertLoss(reduction="none")(b.x[:2], b.y, scale, b.x_mask[:2], b.y_mask, start=2)
    kept = torch.tensor([0, 1, 2, 4, 5])
    scores = scale * reference.token_scores(b.x[:1], b.y[kept], b.x_mask[:1], b.y_mask[kept], mean=False)
    others = torch.cat([scores[0, :2], scores[0, 3:]])
    torch.testing.assert_close(given[0], reference.softplus(others.logsumexp(0) - scores[0, 2]), rtol=1e-10, atol=0.0)
    assert given[1] == 0  # its document is empty, and so is its query


def test_distillation_scaled_to_one_as_pylate_does():
    b = batch(5)
    loss = LateDistillationLoss(min_max=True)
    given = loss(b.x, b.negatives, b.teacher, 1.0, b.x_mask, b.negative_mask)
    scores = maxsim(b.x, b.negatives, b.x_mask, b.negative_mask)
    least, most = scores.min(1, keepdim=True).values, scores.max(1, keepdim=True).values
    expected = reference.distillation((scores - least) / (most - least + 1e-8), b.teacher, 1.0).mean()
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-13)


def test_losses_over_a_given_score_matrix():
    """Each is what it is over features whose products are those scores."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    ids = torch.tensor([0, 1, 0, 2, 1])
    cases = [
        (ClipLoss(label_smoothing=0.1), {}),
        (SigLipLoss(), {"logit_bias": torch.tensor(-2.0, dtype=torch.float64)}),
        (TripletLoss(mining="hardest"), {}),
        (MultiPositiveLoss(), {"image_ids": ids, "text_ids": ids}),
    ]
    for loss, given in cases:
        results = []
        for from_scores in (True, False):
            leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
            if from_scores:
                value = over_scores(loss, leaves[0] @ leaves[1].T, None, 3.0, **given)
            else:
                value = loss(*leaves, 3.0, **given)
            value.backward()
            results.append((value.detach(), *(leaf.grad for leaf in leaves)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_a_loss_without_directions_takes_one_matrix():
    scores = torch.eye(3)
    with pytest.raises(ValueError, match="SigLipLoss has no direction_weights"):
        over_scores(SigLipLoss(), scores, scores, 1.0, logit_bias=0.0)


def test_selected_tokens_are_those_closest_to_the_other_modality():
    b = batch(5, x_length=8, y_length=6)
    loss = FilipLoss(select_tokens=0.25)
    chosen = []
    for (tokens, mask), (others, of_others) in (
        ((b.x, b.x_mask), (b.y, b.y_mask)),
        ((b.y, b.y_mask), (b.x, b.x_mask)),
    ):
        everyone = others[of_others]
        kept = torch.zeros_like(mask)
        for i in range(5):
            best = (tokens[i][mask[i]] @ everyone.T).max(1).values
            count = -(-int(mask[i].sum()) // 4)
            kept[i, mask[i].nonzero()[:, 0][best.argsort(descending=True)[:count]]] = True
        chosen.append(kept)
    results = []
    for given, of_x, of_y in ((loss, b.x_mask, b.y_mask), (FilipLoss(), *chosen)):
        leaves = [b.x.clone().requires_grad_(), b.y.clone().requires_grad_()]
        value = given(*leaves, 4.0, of_x, of_y)
        value.backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-13)


def test_two_ranks_equal_one_process(tmp_path):
    known = LOSSES | OVER_RANKS
    cases = [(name, sizes, {}) for name in known for sizes in ([4, 3], [0, 6])]
    cases += [(name, sizes, {"strategy": "ring"}) for name in LOSSES for sizes in ([4, 3], [0, 6])]
    cases += [("colbert_own", [0, 6], {"query_block": 4, "reduction": "sum"}), ("filip", [3, 3], {"local_loss": True})]
    ranks = on_two_ranks(WORKER, cases, tmp_path)
    for k, (name, sizes, options) in enumerate(cases):
        b = batch(sum(sizes), empty=name in LOSSES)
        b.y_mask[sizes[0] :, 2:] = False  # rank 1's texts are padded to 2 tokens
        loss = known[name].make(reduction=options.get("reduction", "mean"))
        value, gradients = differentiated(lambda b, s, i=name, m=loss: known[i].call(m, b, s), b, 4.0, torch.float64)
        given = [rank[k] for rank in ranks]
        # float64: only the order of summation differs.
        close = {"rtol": 1e-10, "atol": 1e-11, "msg": lambda said, case=cases[k]: f"{case}: {said}"}
        assert [each["dropped"] for each in given] == [loss.dropped_pairs] * 2
        values = [each["value"] for each in given]
        assert options.get("local_loss") or values[0] == values[1]
        torch.testing.assert_close(torch.stack(values).mean(), value, **close)
        # The trainer takes the mean over ranks; a rank has the tokens of its own rows alone.
        x, y, negatives, scale = zip(*(each["gradients"] for each in given))
        y = (y[0], torch.nn.functional.pad(y[1], (0, 0, 0, 1)))
        for parts, right in zip((x, y, negatives), gradients):
            torch.testing.assert_close(torch.cat(parts) / 2, right, **close)
        torch.testing.assert_close(torch.stack(scale).mean(), gradients[3], **close)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: FilipLoss()(x, x[:2], 1.0), r"expected as many sets of both"),
        (lambda x: FilipLoss()(x[0], x, 1.0), r"image_tokens is a .*\[4, 5\]: expected embeddings"),
        (lambda x: FilipLoss()(x, x, 1.0, torch.ones(3, 4)), r"mask of image_tokens .* bool tensor"),
        (lambda x: FilipLoss()(x, x, torch.ones(3)), r"logit_scale"),
        (lambda x: FilipLoss(select_tokens=1.5), r"select_tokens=1.5"),
        (lambda x: FilipLoss(travelling="audio"), r"travelling='audio'"),
        (lambda x: ColbertLoss(negatives="none"), r"negatives='none'"),
        (lambda x: ColbertLoss(temperature=0), r"temperature=0"),
        (lambda x: ColbertLoss(query_block=2, direction_weights=(1, 1)), r"query_block=2 with direction_weights"),
        (lambda x: ColbertLoss()(x, x, negative_tokens=x), r"negative_tokens is .*\[batch, K, tokens, features\]"),
        (lambda x: ColbertLoss()(x, x[:2]), r"3 queries and 2 documents"),
        (lambda x: LateDistillationLoss()(x, x[:, None], torch.ones(3, 1)), r"K of at least 2"),
        (lambda x: LateDistillationLoss("ce"), r"form='ce'"),
    ],
)
def test_errors_say_what_was_given(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(3, 4, 5))
