"""Losses against soft targets, distances and prefixes: each against its paper's formula, and where that is degenerate."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from against_float64 import Logits, assert_as_exact, relative_error
from objectives import OBJECTIVES, beside
from pairtile.kernels import (
    AlignmentUniformityLoss,
    CACRLoss,
    ClipLoss,
    CWCLLoss,
    DistillClipLoss,
    MatryoshkaLoss,
    ModXLoss,
    MomentumDistillationLoss,
    SDMLoss,
    SoftClipLoss,
    SoftTargetLoss,
    VicinityMixLoss,
    use_backend,
    vicinity_mix,
)


@pytest.fixture
def dense() -> Iterator[None]:
    """For what no backend changes."""
    with use_backend("reference"):
        yield


every_objective = pytest.mark.parametrize("name", OBJECTIVES)


@every_objective
def test_equals_its_formula(backend, embeddings, name):
    objective, b = OBJECTIVES[name], beside([37], 19)
    loss = objective.make()

    def ours(x, y, scale):
        return objective.call(loss, x, y, scale, b.to(x.dtype))

    def dense(logits, x, y):
        return objective.dense(logits, x, y, b.to(x.dtype)).mean()

    assert_as_exact(ours, dense, embeddings(37, 37, 19, cosine=0.3), 14.3)


@every_objective
def test_terms_and_their_sum(dense, embeddings, name):
    if name == "alignment_uniformity":
        pytest.skip("the logarithm of a mean has no terms")
    objective, b = OBJECTIVES[name], beside([9], 6)
    x, y = embeddings(9, 9, 6)
    scale = torch.tensor([6.0], dtype=torch.float64)

    def value(reduction):
        return objective.call(objective.make(reduction=reduction), x, y, scale, b)

    terms = value("none")
    torch.testing.assert_close(terms, objective.dense(Logits(scale), x, y, b), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(terms.sum(), value("sum"))
    torch.testing.assert_close(terms.mean(), value("mean"))


@every_objective
@pytest.mark.parametrize("what", ["one pair", "ties", "all positives"])
def test_degenerate_batches(dense, embeddings, name, what):
    objective, n = OBJECTIVES[name], 1 if what == "one pair" else 6
    b = beside([n], 6)
    x, y = embeddings(n, n, 6)
    if what == "ties":
        x, y = x[:1].expand(n, 6).clone(), y[:1].expand(n, 6).clone()
        b = b.mapped(lambda field, t: t[:1].expand(t.shape).clone() if field in ("teacher", "momentum") else t)
    if what == "all positives":
        b.ids = torch.zeros_like(b.ids)
    truth, given = ([each.clone().requires_grad_() for each in (x, y, torch.tensor(50.0).double())] for _ in range(2))
    value = objective.call(objective.make(), *given, b)
    assert value.isfinite()
    if name == "alignment_uniformity" and n == 1:
        # log of a mean over no pairs; ours counts it as 0.
        torch.testing.assert_close(value, 0.5 * (x - y).square().sum())
        value.backward()
        assert given[0].grad.isfinite().all()
        return
    right = objective.dense(Logits(truth[2]), *truth[:2], b).mean()
    torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-10)
    value.backward()
    right.backward()
    for ours, expected in zip(given, truth):
        expected = torch.zeros_like(ours) if expected.grad is None else expected.grad
        found = torch.zeros_like(ours) if ours.grad is None else ours.grad
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["distill", "cwcl", "sdm_by_id", "cacr"])
def test_16_bit_features_lose_nothing_beyond_their_own_rounding(backend, embeddings, name):
    objective, b = OBJECTIVES[name], beside([33], 16).mapped(lambda _, t: t.bfloat16() if t.is_floating_point() else t)
    features = [each.bfloat16() for each in embeddings(33, 33, 16, cosine=0.3)]
    wide, narrow = ([each.to(d).requires_grad_() for each in features] for d in (torch.float64, torch.bfloat16))
    with use_backend("reference"):
        truth = objective.call(objective.make(), *wide, 10.0, b.to(torch.float64))
        truth.backward()
    value = objective.call(objective.make(), *narrow, 10.0, b)
    assert value.dtype == torch.float32
    assert relative_error(value, truth) < 5e-6
    value.backward()
    for ours, right in zip(narrow, wide):
        # Half an eps for each entry of a gradient that is rounded once; CACR's is a sum of two, both 16 bits.
        assert relative_error(ours.grad, right.grad) < torch.finfo(torch.bfloat16).eps


def test_autocast_changes_nothing(embeddings):
    leaves = [each.float().requires_grad_() for each in (*embeddings(9, 9, 6), torch.tensor(20.0))]
    b = beside([9], 6).to(torch.float32)
    for objective in OBJECTIVES.values():
        with use_backend("torch"):
            plain = objective.call(objective.make(), *leaves, b)
            with torch.autocast("cpu", torch.bfloat16):
                cast = objective.call(objective.make(), *leaves, b)
        assert torch.equal(plain, cast)
        of_both = [torch.autograd.grad(value, leaves, allow_unused=True) for value in (plain, cast)]
        for one, other in zip(*of_both):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("name", ["distill", "vicinity_mix", "alignment_uniformity"])
def test_one_compiled_graph_serves_batches_of_any_size(embeddings, name):
    torch.compiler.reset()
    objective, loss, graphs = OBJECTIVES[name], OBJECTIVES[name].make(), []

    def remember(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *batch: objective.call(loss, *batch), fullgraph=True, backend=remember)
    with use_backend("torch"):
        for n in (12, 20, 37):
            batch = (*embeddings(n, n, 6), 4.0, beside([n], 6))
            torch.testing.assert_close(compiled(*batch), objective.call(loss, *batch))
    assert len(graphs) == 2, "one for the first size, one for all others"


@pytest.mark.parametrize("name", ["distill", "soft_target", "momentum", "cwcl", "mod_x"])
def test_teachers_get_no_gradient(dense, embeddings, name):
    objective, b = OBJECTIVES[name], beside([5], 6).mapped(lambda _, t: t.requires_grad_(t.is_floating_point()))
    x, y = embeddings(5, 5, 6)
    objective.call(objective.make(), x.requires_grad_(), y, 5.0, b).backward()
    assert x.grad.abs().sum() > 0
    assert all(t.grad is None for pair in (b.teacher, b.other_teacher, b.momentum, b.queues) for t in pair)


def test_distillation_does_not_cancel_where_teacher_and_student_agree_on_the_pair(backend, embeddings):
    x, y = (each.float() for each in embeddings(64, 64, 32, cosine=0.9))
    teacher = [each.float() for each in embeddings(64, 64, 24, cosine=0.9, seed=1)]

    def gradients(dtype, loss):
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in (x, y)]
        return torch.autograd.grad(loss(*leaves, *(each.to(dtype) for each in teacher)), leaves)

    def ours(x, y, *teacher):
        return DistillClipLoss()(x, y, 30.0, *teacher, 30.0)[1]

    def theirs(x, y, *teacher):
        return open_clip.loss.DistillClipLoss()(x, y, 30.0, *teacher, 30.0)[1]

    with use_backend("reference"):
        truth = gradients(torch.float64, ours)
    for given, dense, right in zip(gradients(torch.float32, ours), gradients(torch.float32, theirs), truth):
        # Rounding of scores, absolute errors in exponents of size 27: of S_ii and T_ii once, of the others' tile.
        assert relative_error(given, right) < 27 * 2.5e-7
        assert relative_error(dense, right) > 10 * relative_error(given, right)


def test_distill_returns_what_open_clips_class_returns(dense, embeddings):
    x, y = embeddings(7, 7, 5)
    teacher = embeddings(7, 7, 4, seed=1)
    for output_dict in (False, True):
        ours, theirs = (
            cls()(x, y, 9.0, *teacher, 30.0, output_dict=output_dict)
            for cls in (DistillClipLoss, open_clip.loss.DistillClipLoss)
        )
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours, theirs)
    for method in ("__init__", "forward"):
        given, expected = (
            inspect.signature(getattr(cls, method)).parameters
            for cls in (DistillClipLoss, open_clip.loss.DistillClipLoss)
        )
        positional = {key: p.default for key, p in given.items() if p.kind is not p.KEYWORD_ONLY}
        assert list(positional.items()) == [(key, p.default) for key, p in expected.items()]


def test_teachers_of_a_list_are_averaged(dense, embeddings):
    x, y = embeddings(6, 6, 5)
    teachers = [embeddings(6, 6, width, seed=width) for width in (4, 3)]
    loss = DistillClipLoss()
    one_by_one = [loss(x, y, 9.0, *teacher, 8.0)[1] for teacher in teachers]
    torch.testing.assert_close(loss(x, y, 9.0, *zip(*teachers), 8.0)[1], torch.stack(one_by_one).mean())


def test_views_of_unequal_number(dense, embeddings):
    """Two texts of an image, a text without an image, an image without a text: by id alone."""
    x, y = embeddings(3, 4, 5)
    image_ids, text_ids = torch.tensor([4, 7, 9]), torch.tensor([4, 4, 7, 1])
    for loss, scale in ((SDMLoss(direction_weights=(1.0, 0.0), reduction="none"), [6.0]), (CACRLoss(), [])):
        x_leaf = x.clone().requires_grad_()
        value = loss(x_leaf, y, *scale, image_ids=image_ids, text_ids=text_ids)
        value.sum().backward()
        assert value.isfinite().all()
        assert x_leaf.grad.isfinite().all()
        if scale:
            assert value[2] == 0
            assert x_leaf.grad[2].abs().sum() == 0


def test_a_direction_of_weight_zero(dense, embeddings):
    x, y = embeddings(8, 8, 6)
    b = beside([8], 6)
    for forward, backward, call in (
        (
            SoftTargetLoss(direction_weights=(1, 0)),
            SoftTargetLoss(direction_weights=(0, 1)),
            (b.teacher[0], b.teacher[1]),
        ),
        (SDMLoss(direction_weights=(1, 0)), SDMLoss(direction_weights=(0, 1)), ()),
        (DistillClipLoss(direction_weights=(1, 0)), DistillClipLoss(direction_weights=(0, 1)), (*b.teacher, 5.0)),
    ):
        one, other = forward(x, y, 5.0, *call), backward(y, x, 5.0, *(call[1::-1] + call[2:]))
        torch.testing.assert_close(one, other)


def test_special_cases(dense, embeddings):
    x, y = embeddings(8, 8, 6)
    b = beside([8], 6)
    clip = ClipLoss()(x, y, 5.0)
    torch.testing.assert_close(SoftTargetLoss(alpha=0.0)(x, y, 5.0, *b.teacher), clip)
    torch.testing.assert_close(ModXLoss(distill_weight=0.0)(x, y, 5.0, *b.teacher), clip)
    torch.testing.assert_close(MatryoshkaLoss([6], normalize=False)(x, y, 5.0), clip)
    itself = torch.arange(8)
    torch.testing.assert_close(VicinityMixLoss()(x, y, 5.0, itself, b.lam), clip)
    only = AlignmentUniformityLoss(alignment_weight=0, uniformity_weight=0, cross_uniformity_weight=0)
    torch.testing.assert_close(only(x, y, 5.0), clip)
    # The teacher's own similarities: the model agrees with itself.
    assert ModXLoss(clip_loss_weight=0.0)(x, y, 5.0, x, y).abs() < 1e-12
    assert CACRLoss()(x, y, output_dict=True)["contrastive_loss"] == CACRLoss()(x, y)
    keys = MomentumDistillationLoss(alpha=0.0)(x, y, 5.0, x, y)
    torch.testing.assert_close(keys, clip)


def test_vicinity_mix_mixes():
    inputs = torch.randn(40, 3, 2)
    mixed, perm, lam = vicinity_mix(inputs, generator=torch.Generator().manual_seed(1))
    again = vicinity_mix(inputs, generator=torch.Generator().manual_seed(1))
    for one, other in zip((mixed, perm, lam), again):
        assert torch.equal(one, other)
    share = lam[:, None, None]
    torch.testing.assert_close(mixed, share * inputs + (1 - share) * inputs[perm])
    alone = perm == torch.arange(40)
    assert 10 < alone.sum() < 30
    assert torch.equal(mixed[alone], inputs[alone])
    assert ((lam >= 0) & (lam <= 1)).all()
    # alpha so small that a gamma variate underflows in float32
    assert vicinity_mix(inputs, alpha=1e-2)[2].isfinite().all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SoftTargetLoss(alpha=2.0), "alpha=2.0: expected a number from 0 to 1"),
        (lambda: SDMLoss(eps=0.0), "eps=0.0: expected a positive number"),
        (lambda: CACRLoss(tau_neg=-1.0), "tau_neg=-1.0: expected a number of at least 0"),
        (lambda: AlignmentUniformityLoss(reduction="sum"), "uniformity is the logarithm of a mean"),
        (lambda: AlignmentUniformityLoss(t=0), "t=0: expected a positive number"),
        (
            lambda: AlignmentUniformityLoss(
                alignment_weight=0, uniformity_weight=0, cross_uniformity_weight=0, clip_loss_weight=0
            ),
            "all four weights are 0",
        ),
        (lambda: MatryoshkaLoss([]), "expected whole numbers from 1"),
        (lambda: MatryoshkaLoss([2, 4], [1.0]), "1 weights for 2 widths"),
        (lambda: SDMLoss(direction_weights=(0, 0)), "expected two numbers of at least 0"),
        (lambda: vicinity_mix(torch.zeros(2, 3), alpha=0.0), "alpha=0.0"),
    ],
)
def test_options_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_batches_that_do_not_fit_are_refused():
    x = F.normalize(torch.ones(3, 4), dim=-1)
    with pytest.raises(ValueError, match=r"a teacher's image features \[2, 5\] and text features \[3, 5\]"):
        SoftTargetLoss()(x, x, 1.0, torch.ones(2, 5), torch.ones(3, 5))
    with pytest.raises(ValueError, match="2 teachers' image features, 1 text features and 2 logit scales"):
        DistillClipLoss()(x, x, 1.0, [x, x], [x], 1.0)
    with pytest.raises(ValueError, match=r"momentum_text_features has shape \[3, 5\]: expected that of the batch"):
        MomentumDistillationLoss()(x, x, 1.0, x, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"locked_features has shape \[2, 4\]: expected \[3, any\]"):
        CWCLLoss()(x, x, 1.0, x[:2])
    with pytest.raises(ValueError, match="perm holds 0 to 3: expected rows of this rank's batch"):
        VicinityMixLoss()(x, x, 1.0, torch.tensor([0, 3, 1]), torch.ones(3))
    with pytest.raises(ValueError, match=r"widths=\(2, 8\): the features have 4"):
        MatryoshkaLoss([2, 8])(x, x, 1.0)


def test_the_dense_formulations_of_the_benchmarks(dense, embeddings):
    file = Path(__file__).parents[2] / "benchmarks" / "dense_soft_losses.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    x, y = embeddings(10, 10, 6, cosine=0.3)
    b, scale, widths = beside([10], 6), torch.tensor(7.0, dtype=torch.float64), (2, 6)
    taught = [list(each) for each in zip(b.teacher, b.other_teacher)]
    for ours, theirs in (
        (DistillClipLoss()(x, y, scale, *taught, 9.0), plain.distill_clip_loss(x, y, scale, *taught, [9.0, 9.0])),
        (
            SoftTargetLoss(alpha=0.3)(x, y, scale, *b.teacher, 9.0),
            plain.soft_target_loss(x, y, scale, *b.teacher, 9.0, 0.3),
        ),
        (SoftClipLoss()(x, y, scale, 5.0), plain.soft_clip_loss(x, y, scale, 5.0)),
        (
            MomentumDistillationLoss()(x, y, scale, *b.momentum, *b.queues),
            plain.momentum_distillation_loss(x, y, scale, *b.momentum, *b.queues),
        ),
        (CWCLLoss()(x, y, scale), plain.cwcl_loss(x, y, scale)),
        (SDMLoss()(x, y, scale, image_ids=b.ids), plain.sdm_loss(x, y, scale, b.ids)),
        (ModXLoss()(x, y, scale, *b.teacher, 9.0), plain.mod_x_loss(x, y, scale, *b.teacher, 9.0)),
        (VicinityMixLoss()(x, y, scale, b.perm, b.lam), plain.vicinity_mix_loss(x, y, scale, b.perm, b.lam)),
        (CACRLoss()(x, y, image_ids=b.ids), plain.cacr_loss(x, y, b.ids)),
        (AlignmentUniformityLoss()(x, y, scale), plain.alignment_uniformity_loss(x, y, scale)),
        (MatryoshkaLoss(widths)(x, y, scale), plain.matryoshka_loss(x, y, scale, widths)),
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("by_id", [False, True])
def test_a_small_divergence_keeps_its_digits(backend, embeddings, by_id):
    """Aligned pairs, a KL of 1e-4: in dense float32, and wherever its parts are not kept apart, the value is off by 5e-4."""
    x, y = embeddings(48, 48, 32, cosine=0.96)
    ids = {"image_ids": torch.arange(48)} if by_id else {}

    def outcome(dtype):
        leaves = [each.to(dtype).requires_grad_() for each in (x.float(), y.float(), torch.tensor(20.0))]
        value = SDMLoss()(*leaves, **ids)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    with use_backend("reference"):
        truth = outcome(torch.float64)
    for given, right in zip(outcome(torch.float32), truth, strict=True):
        # By id a pair's score is the tile's, with the rounding of a float32 of 20.
        assert float((given.double() - right).norm()) <= (1e-4 if by_id else 2e-5) * float(right.norm())


def test_a_closed_gate_hides_no_nan(backend, embeddings):
    x, y = (each.float() for each in embeddings(6, 6, 4))
    old = x.clone()
    old[5, 0] = torch.nan
    assert ModXLoss(direction_weights=(1.0, 0.0))(x, y, 14.0, old, y, 10.0).isnan()


def test_uniformity_of_large_float16_features(backend):
    features = torch.zeros(4, 8, dtype=torch.float16)
    features[:, 0], features[0, 1] = torch.arange(4), 40_000
    loss = AlignmentUniformityLoss(alignment_weight=0, cross_uniformity_weight=0, clip_loss_weight=0)
    assert loss(features, features).isfinite()


def test_float32_features_give_float32_whatever_the_scale_is(backend, embeddings):
    x, y = (each.float() for each in embeddings(5, 5, 4))
    assert CWCLLoss()(x, y, torch.tensor([14.0], dtype=torch.float64)).dtype == torch.float32
