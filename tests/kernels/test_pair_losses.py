"""Losses beyond CLIP's over pairs and ids, each against its formula in float64, written out in tests/reference."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import debiased
import decoupled
import hard_negative
import multi_positive
import siglip_plus
import triplet
from against_float64 import Logits, assert_as_exact
from pairtile.kernels import (
    CircleLoss,
    ClipLoss,
    DebiasedContrastiveLoss,
    DecoupledContrastiveLoss,
    HardNegativeLoss,
    MultiPositiveLoss,
    SigLipLoss,
    SigLipPlusLoss,
    TripletLoss,
)


def dense_losses() -> ModuleType:
    """benchmarks/dense_pair_losses.py, without the root on sys.path."""
    path = Path(__file__).parents[2] / "benchmarks" / "dense_pair_losses.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


practitioner = dense_losses()

N, D = 37, 19
#: Images share ids, one of them has no text; texts are of any number.
IMAGE_IDS = torch.arange(N) // 2 * 3
TEXT_IDS = torch.cat([torch.arange(N - 4) // 3 * 3, torch.full((8,), 9), torch.tensor([-5, 10**12, 1])])
SAME = IMAGE_IDS[:, None] == TEXT_IDS
IDS = {"image_ids": IMAGE_IDS, "text_ids": TEXT_IDS}
WEIGHTS = (0.3, 1.2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, its reference from `Logits` and the features, and what features those are."""

    ours: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...] = ((N, D), (N, D))
    scale: float = 14.3


def both(terms: Callable[[Tensor], Tensor], scores: Tensor, weights: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    return weights[0] * terms(scores).mean() + weights[1] * terms(scores.T).mean()


def by_id(terms: Callable[..., Tensor], scores: Tensor, weights: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    return weights[0] * terms(scores, SAME).mean() + weights[1] * terms(scores.T, SAME.T).mean()


def case_siglip_plus() -> Case:
    def dense(logits: Logits, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        return siglip_plus.terms(logits(x, y) + bias, SAME).mean()

    loss = SigLipPlusLoss()
    return Case(lambda x, y, bias, scale: loss(x, y, scale, bias, **IDS), dense, ((N, D), (len(TEXT_IDS), D), (1,)))


def case_decoupled(weighted: bool, intra: bool) -> Case:
    loss = DecoupledContrastiveLoss(weighted=weighted, intra=intra, direction_weights=WEIGHTS)

    def dense(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
        scores, w = logits(x, y), decoupled.weights((x * y).sum(1), 0.5) if weighted else 1.0
        within = (logits(x, x), logits(y, y)) if intra else (None, None)
        each = decoupled.terms(scores, w, within[0]), decoupled.terms(scores.T, w, within[1])
        return WEIGHTS[0] * each[0].mean() + WEIGHTS[1] * each[1].mean()

    return Case(loss, dense)


def case_multi_positive(positives: str, denominator: str, weights: tuple[float, float] = WEIGHTS) -> Case:
    loss = MultiPositiveLoss(positives=positives, denominator=denominator, direction_weights=weights)

    def dense(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
        return by_id(lambda s, same: multi_positive.terms(s, same, positives, denominator), logits(x, y), weights)

    return Case(lambda x, y, scale: loss(x, y, scale, **IDS), dense, ((N, D), (len(TEXT_IDS), D)))


def case_circle() -> Case:
    loss = CircleLoss(16.0, 0.2, direction_weights=WEIGHTS)

    def dense(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
        return by_id(lambda s, same: multi_positive.circle_terms(s, same, 16.0, 0.2), x @ y.T, WEIGHTS)

    return Case(lambda x, y, scale: loss(x, y, **IDS), dense, ((N, D), (len(TEXT_IDS), D)))


def case_debiased(tau_plus: float, beta: float) -> Case:
    loss = DebiasedContrastiveLoss(tau_plus=tau_plus, beta=beta, direction_weights=WEIGHTS)

    def dense(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
        return both(lambda s: debiased.terms(s, logits.scale, tau_plus, beta), logits(x, y), WEIGHTS)

    return Case(loss, dense, scale=5.0)


def case_hard_negative(k: int | None, threshold: float | None) -> Case:
    loss = HardNegativeLoss(k=k, threshold=threshold, direction_weights=WEIGHTS)

    def ours(x: Tensor, y: Tensor, texts: Tensor, images: Tensor, private: Tensor, scale: Tensor) -> Tensor:
        negatives = {"negative_text_features": texts, "negative_image_features": images}
        return loss(x, y, scale, negative_features=private, **negatives)

    def dense(logits: Logits, x: Tensor, y: Tensor, texts: Tensor, images: Tensor, private: Tensor) -> Tensor:
        own = torch.cat([logits(x[i : i + 1], private[i]) for i in range(N)])
        rows, cols = logits(x, torch.cat([y, texts])), logits(y, torch.cat([x, images]))
        of_images = hard_negative.terms(rows, logits.scale, k, threshold, own)
        return WEIGHTS[0] * of_images.mean() + WEIGHTS[1] * hard_negative.terms(cols, logits.scale, k, threshold).mean()

    return Case(ours, dense, ((N, D), (N, D), (5, D), (3, D), (N, 2, D)))


def case_triplet(mining: str, form: str | None) -> Case:
    generator = torch.Generator().manual_seed(5)
    peer = [torch.nn.functional.normalize(torch.randn(N, 7, generator=generator), dim=1) for _ in range(2)]
    loss = TripletLoss(mining=mining, direction_weights=WEIGHTS, peer_form=form or "relative", positive_share=0.3)
    peers = {"peer_image_features": peer[0], "peer_text_features": peer[1]} if form else {}

    def dense(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
        scores = logits(x, y)
        of_peer = logits.scale * (peer[0] @ peer[1].T).to(scores) if form else None
        if form == "absolute":
            rows, cols = (
                triplet.absolute_terms(*each) for each in ((scores, 0.2, 0.3, of_peer), (scores.T, 0.2, 0.3, of_peer.T))
            )
        else:
            rows = triplet.terms(scores, 0.2, mining, of_peer)
            cols = triplet.terms(scores.T, 0.2, mining, None if of_peer is None else of_peer.T)
        return WEIGHTS[0] * rows.mean() + WEIGHTS[1] * cols.mean()

    return Case(lambda x, y, scale: loss(x, y, scale, **peers), dense, scale=1.0)


CASES = {
    "siglip_plus": case_siglip_plus(),
    "decoupled": case_decoupled(False, False),
    "decoupled, weighted, intra": case_decoupled(True, True),
    "mean, all": case_multi_positive("mean", "all"),
    "sum, all, images alone": case_multi_positive("sum", "all", (1.0, 0.0)),
    "inside, all": case_multi_positive("inside", "all"),
    "mean, others_excluded": case_multi_positive("mean", "others_excluded"),
    "sum, mil_nce, texts alone": case_multi_positive("sum", "mil_nce", (0.0, 1.0)),
    "inside, mil_nce": case_multi_positive("inside", "mil_nce"),
    "circle": case_circle(),
    "debiased": case_debiased(0.1, 0.0),
    "debiased, hard": case_debiased(0.05, 0.7),
    "hard negatives": case_hard_negative(4, 0.1),
    "hard negatives, all": case_hard_negative(None, 0.2),
    "triplet": case_triplet("sum", None),
    "triplet, hardest": case_triplet("hardest", None),
    "triplet, relative to a peer": case_triplet("sum", "relative"),
    "triplet, absolutely to a peer": case_triplet("hardest", "absolute"),
}
#: One of each loss, where the interpreter makes all of them slow.
FEW = {
    "siglip_plus",
    "decoupled, weighted, intra",
    "mean, all",
    "mean, others_excluded",
    "inside, mil_nce",
    "circle",
    "debiased, hard",
    "hard negatives",
    "triplet",
    "triplet, absolutely to a peer",
}


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_formula(backend, name):
    if backend == "triton" and name not in FEW:
        pytest.skip("the interpreter is slow; the reductions are those of the others")
    case = CASES[name]
    # A shape of one number is a bias.
    features = [unit(*shape, seed=k) if len(shape) > 1 else torch.tensor([-2.5]) for k, shape in enumerate(case.shapes)]
    assert_as_exact(case.ours, case.dense, features, case.scale)


PAIRED = {
    "siglip_plus": lambda **options: SigLipPlusLoss(**options),
    "decoupled": lambda **options: DecoupledContrastiveLoss(weighted=True, intra=True, **options),
    "mean, all": lambda **options: MultiPositiveLoss(**options),
    "sum, others_excluded": lambda **options: MultiPositiveLoss(
        positives="sum", denominator="others_excluded", **options
    ),
    "inside, mil_nce": lambda **options: MultiPositiveLoss(positives="inside", denominator="mil_nce", **options),
    "circle": lambda **options: CircleLoss(**options),
    "debiased": lambda **options: DebiasedContrastiveLoss(beta=0.5, **options),
    "hard negatives": lambda **options: HardNegativeLoss(k=3, **options),
    "triplet": lambda **options: TripletLoss(**options),
    "hardest": lambda **options: TripletLoss(mining="hardest", **options),
}


def called(name: str, loss: torch.nn.Module, x: Tensor, y: Tensor, scale: Tensor | float, ids: Tensor) -> Tensor:
    """A loss of `PAIRED`, whatever it takes."""
    if isinstance(loss, CircleLoss):
        return loss(x, y, image_ids=ids)
    if isinstance(loss, SigLipPlusLoss):
        return loss(x, y, scale, -1.0, image_ids=ids)
    return loss(x, y, scale, image_ids=ids) if isinstance(loss, MultiPositiveLoss) else loss(x, y, scale)


every_loss = pytest.mark.parametrize("name", PAIRED)
# What holds for the vectors that a backend gives holds for all backends.
on_two_backends = pytest.mark.parametrize("backend", ["reference", "torch"], indirect=True)

on_the_oracle = pytest.mark.parametrize("backend", ["reference"], indirect=True)


@on_two_backends
@every_loss
def test_reductions(backend, name):
    x, y, ids = unit(9, 5), unit(9, 5, seed=1), torch.arange(9) // 2
    losses = [PAIRED[name](reduction=reduction) for reduction in ("none", "sum", "mean")]
    terms, total, mean = (called(name, loss, x, y, 6.0, ids) for loss in losses)
    assert terms.shape == (9,)
    torch.testing.assert_close(total, terms.sum())
    torch.testing.assert_close(mean, terms.mean())
    torch.testing.assert_close(called(name, losses[2], x, y, torch.tensor([6.0]), ids), mean)
    assert torch.equal(
        PAIRED[name](local_loss=True)(x, y, **arguments(name, ids), output_dict=True)["contrastive_loss"], mean
    )


def arguments(name: str, ids: Tensor) -> dict[str, object]:
    scale = {} if name == "circle" else {"logit_scale": 6.0}
    bias = {"logit_bias": -1.0} if name == "siglip_plus" else {}
    with_ids = ("siglip_plus", "mean, all", "sum, others_excluded", "inside, mil_nce", "circle")
    return scale | bias | ({"image_ids": ids} if name in with_ids else {})


@on_two_backends
@every_loss
@pytest.mark.parametrize("kind", ["one pair", "all positives", "no positives", "ties", "no rows", "scale 100"])
def test_edges_are_finite(backend, name, kind):
    n = {"one pair": 1, "no rows": 0}.get(kind, 6)
    x, y = unit(n, 5), unit(n, 5, seed=1)
    if kind == "ties":
        x, y = x[:1].repeat(n, 1), x[:1].repeat(n, 1)
    ids = torch.zeros(n, dtype=torch.long) if kind == "all positives" else torch.arange(n)
    leaves = [each.float().requires_grad_() for each in (x, y, torch.tensor(100.0 if kind == "scale 100" else 7.0))]
    loss = PAIRED[name](reduction="sum")
    value = called(name, loss, *leaves, ids)
    if kind == "no positives" and isinstance(loss, (MultiPositiveLoss, CircleLoss)):
        given = leaves[2:] if isinstance(loss, MultiPositiveLoss) else ()
        value = loss(*leaves[:2], *given, image_ids=ids, text_ids=ids + 100)
        assert value.item() == 0
    assert value.isfinite()
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    assert all(each is None or each.isfinite().all() for each in gradients)
    nothing = (n <= 1 and name != "siglip_plus") or (kind == "no positives" and value.item() == 0)
    if nothing:
        assert value.item() == 0
        assert all(each is None or (each == 0).all() for each in gradients)


@on_two_backends
def test_no_scale_overflows_a_logarithm(backend):
    """Where the papers' exponentials are infinite: float32 against float64, at scale 100 and well aligned."""
    x, y = unit(24, 16), unit(24, 16, seed=1)
    y = torch.nn.functional.normalize(x + 0.3 * y, dim=1)
    for loss, formula in (
        (DebiasedContrastiveLoss(), lambda s: debiased.terms(s, torch.tensor(100.0).double(), 0.1, 0.0)),
        (DebiasedContrastiveLoss(beta=1.0), lambda s: debiased.terms(s, torch.tensor(100.0).double(), 0.1, 1.0)),
        (DecoupledContrastiveLoss(), decoupled.terms),
    ):
        truth = both(formula, 100 * x @ y.T)
        # An exponent of 100 has an absolute error of some 1e-5, and so has its logarithm.
        torch.testing.assert_close(loss(x.float(), y.float(), 100.0).double(), truth, rtol=1e-6, atol=3e-5)


@on_two_backends
@pytest.mark.parametrize("denominator", ["all", "others_excluded"])
def test_one_positive_each_is_as_exact_as_clip(backend, embeddings, relative_error, denominator):
    """Well aligned, where the gradient is small: 1e-4 of one that was left over would show."""
    x, y = (each.float() for each in embeddings(64, 64, 32, cosine=0.95))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    ids = {"image_ids": torch.arange(64), "text_ids": order}

    def value_and_gradients(loss, dtype, **given):
        leaves = [each.to(dtype).requires_grad_() for each in (x, y[order], torch.tensor(100.0))]
        texts = leaves[1] if given else leaves[1][order.argsort()]
        value = loss(leaves[0], texts, leaves[2], **given)
        return [value, *torch.autograd.grad(value, leaves)]

    truth = value_and_gradients(ClipLoss(), torch.float64)
    clip = value_and_gradients(ClipLoss(), torch.float32)
    given = value_and_gradients(MultiPositiveLoss(denominator=denominator), torch.float32, **ids)
    for right, plain, ours in zip(truth, clip, given):
        assert relative_error(ours, right) <= 2 * relative_error(plain, right) + 1e-7


def test_of_many_positives_a_second_sweep(backend):
    """Above 64 positives the scores are not kept: the same value and gradients by another way."""
    n = 5 if backend == "triton" else 9
    x, y, image_ids = unit(n, 4), unit(70 + n, 4, seed=1), torch.arange(n)
    text_ids = torch.cat([torch.zeros(69, dtype=torch.long), torch.arange(n + 1)])
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        loss = MultiPositiveLoss(denominator="others_excluded", direction_weights=weights)

        def dense(logits, x, y, weights=weights):
            scores, same = logits(x, y), image_ids[:, None] == text_ids
            scores, same = (scores, same) if weights[0] else (scores.T, same.T)
            return multi_positive.terms(scores, same, "mean", "others_excluded").mean()

        def ours(x, y, scale, loss=loss):
            return loss(x, y, scale, image_ids=image_ids, text_ids=text_ids)

        assert_as_exact(ours, dense, (x, y), 9.0)
        if backend == "triton":
            return


@pytest.mark.parametrize("name", ["mean, all", "hard negatives"])
def test_bfloat16_features_give_a_float32_loss(backend, relative_error, name):
    x, y, ids = unit(33, 16).bfloat16(), unit(33, 16, seed=1).bfloat16(), torch.arange(33) // 2
    results = {}
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [each.to(dtype).requires_grad_() for each in (x, y)]
        value = called(name, PAIRED[name](), *leaves, 10.0, ids)
        results[dtype] = [value, *torch.autograd.grad(value, leaves)]
    given, truth = results[torch.bfloat16], results[torch.float64]
    assert given[0].dtype == torch.float32
    assert relative_error(given[0], truth[0]) < 2e-6
    for ours, right in zip(given[1:], truth[1:]):
        assert ours.dtype == torch.bfloat16
        # Weights and result are rounded to the features' dtype, half an eps for each entry, and so are the parts that
        # autograd adds up: the sweep's and that of the sums by id.
        assert relative_error(ours, right) < 1.5 * torch.finfo(torch.bfloat16).eps


def leaves_and_ids() -> tuple[list[Tensor], Tensor]:
    leaves = [each.float().requires_grad_() for each in (unit(9, 6), unit(9, 6, seed=1), torch.tensor(5.0))]
    return leaves, torch.arange(9) // 2


@every_loss
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_autocast_changes_nothing(backend, name):
    leaves, ids = leaves_and_ids()
    loss, results = PAIRED[name](), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = called(name, loss, *leaves, ids)
        results.append([value, *torch.autograd.grad(value, leaves, allow_unused=True)])
    for plain, given in zip(*results):
        assert plain is given or torch.equal(plain, given)


@every_loss
@on_the_oracle
def test_a_double_backward_is_finite(backend, name):
    leaves, ids = leaves_and_ids()
    value = called(name, PAIRED[name](), *leaves, ids)
    gradients = torch.autograd.grad(value, leaves[:2], create_graph=True)
    for each in torch.autograd.grad(sum(each.square().sum() for each in gradients), leaves[:2], allow_unused=True):
        assert each is None or each.isfinite().all()


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_a_training_step_compiles_into_one_graph(backend):
    torch.compiler.reset()
    leaves, ids = leaves_and_ids()
    losses = {name: PAIRED[name]() for name in ("sum, others_excluded", "hard negatives")}

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return sum(called(name, loss, x, y, scale, ids) for name, loss in losses.items())

    given, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), step(*leaves)
    # Traced, the scores of several positives are swept twice and not kept: float32 in another order.
    torch.testing.assert_close(given, expected, rtol=2e-6, atol=0)
    for one, other in zip(torch.autograd.grad(given, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


@on_the_oracle
def test_special_cases_are_the_losses_that_they_generalise(backend):
    x, y = unit(12, 6), unit(12, 6, seed=1)
    for loss in (
        MultiPositiveLoss(),
        MultiPositiveLoss(positives="inside"),
        MultiPositiveLoss(positives="sum", denominator="others_excluded"),
    ):
        torch.testing.assert_close(loss(x, y, 9.0, text_ids=torch.arange(12)), ClipLoss()(x, y, 9.0))
    for loss in (DebiasedContrastiveLoss(tau_plus=0.0), HardNegativeLoss(k=None, threshold=None)):
        torch.testing.assert_close(loss(x, y, 9.0), ClipLoss()(x, y, 9.0))
    negatives = {"negative_text_features": unit(4, 6, seed=2), "negative_image_features": unit(3, 6, seed=3)}
    queue = HardNegativeLoss(k=None, threshold=None)(x, y, 9.0, **negatives)
    torch.testing.assert_close(queue, ClipLoss()(x, y, 9.0, **negatives))
    ids = torch.arange(12)
    siglip = SigLipLoss()(x, y, 9.0, -3.0)
    torch.testing.assert_close(SigLipPlusLoss()(x, y, 9.0, -3.0, image_ids=ids), siglip)
    assert torch.equal(SigLipPlusLoss()(x, y, 9.0, -3.0), siglip)


@on_the_oracle
def test_the_weights_of_dclw_have_mean_one_and_a_peer_gets_no_gradient(backend):
    x, y = unit(12, 6).requires_grad_(), unit(12, 6, seed=1).requires_grad_()
    terms = [DecoupledContrastiveLoss(weighted=each, reduction="none")(x, y, 1.0) for each in (False, True)]
    weights = 1 + (terms[0] - terms[1]) / (x * y).sum(1)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0).double())
    peer = {"peer_image_features": unit(12, 3).requires_grad_(), "peer_text_features": unit(12, 3).requires_grad_()}
    loss = TripletLoss()(x, y, **peer)
    assert torch.autograd.grad(loss, list(peer.values()), allow_unused=True) == (None, None)


@on_the_oracle
def test_the_dense_formulations_that_we_are_measured_against_have_the_same_values(backend):
    x, y, scale = unit(N, D), unit(len(TEXT_IDS), D, seed=1), torch.tensor(7.0).double()
    z, of_peer = y[:N], (unit(N, 7, seed=2), unit(N, 7, seed=3))
    # Where every row and column has a positive.
    image_ids, text_ids = torch.arange(N) % 16, torch.arange(len(TEXT_IDS)) % 16
    ids, given = (image_ids, text_ids), {"image_ids": image_ids, "text_ids": text_ids}
    peer = {"peer_image_features": of_peer[0], "peer_text_features": of_peer[1]}
    bias = torch.tensor(-2.0)
    pairs = [
        (SigLipPlusLoss()(x, y, scale, bias, **given), practitioner.siglip_plus(x, y, scale, bias, *ids)),
        (CircleLoss()(x, y, **given), practitioner.circle(x, y, *ids)),
        (HardNegativeLoss()(x, z, scale), practitioner.hard_negatives(x, z, scale)),
        (TripletLoss()(x, z), practitioner.triplet(x, z, torch.tensor(1.0))),
    ]
    for weighted, intra in ((False, False), (True, True)):
        ours = DecoupledContrastiveLoss(weighted=weighted, intra=intra)(x, z, scale)
        pairs.append((ours, practitioner.decoupled(x, z, scale, weighted, intra=intra)))
    for beta in (0.0, 0.5):
        pairs.append((DebiasedContrastiveLoss(beta=beta)(x, z, scale), practitioner.debiased(x, z, scale, beta=beta)))
    for form in ("relative", "absolute"):
        ours = TripletLoss(mining="hardest", peer_form=form)(x, z, scale, **peer)
        pairs.append((ours, practitioner.triplet_with_peer(x, z, scale, *of_peer, form=form)))
    for positives in ("mean", "sum", "inside"):
        for denominator in ("all", "others_excluded", "mil_nce"):
            if (positives, denominator) != ("inside", "others_excluded"):
                ours = MultiPositiveLoss(positives=positives, denominator=denominator)(x, y, scale, **given)
                pairs.append((ours, practitioner.multi_positive(x, y, scale, *ids, positives, denominator)))
    for ours, dense in pairs:
        torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MultiPositiveLoss(positives="max"), "positives='max'"),
        (lambda: MultiPositiveLoss(positives="inside", denominator="others_excluded"), "all positives in one fraction"),
        (lambda: CircleLoss(gamma=0), "gamma=0"),
        (lambda: DecoupledContrastiveLoss(sigma=0), "sigma=0"),
        (lambda: DebiasedContrastiveLoss(tau_plus=1), "tau_plus=1"),
        (lambda: HardNegativeLoss(k=0), "k=0"),
        (lambda: HardNegativeLoss(threshold=float("nan")), "threshold=nan"),
        (lambda: TripletLoss(mining="semi"), "mining='semi'"),
        (lambda: TripletLoss(peer_form="absolute"), 'mining="hardest"'),
        (lambda: TripletLoss(direction_weights=(0, 0)), "direction_weights"),
        (lambda: TripletLoss(reduction="avg"), "reduction='avg'"),
    ],
)
def test_options_that_do_not_exist_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_batches_that_do_not_fit_are_refused():
    x, y = torch.zeros(3, 4), torch.zeros(6, 4)
    with pytest.raises(ValueError, match="3 images and 6 texts with image_ids=a tensor, text_ids=None: pass both"):
        MultiPositiveLoss()(x, y, 1.0, image_ids=torch.arange(3))
    with pytest.raises(ValueError, match=r"image_ids is a torch\.float32 tensor of shape"):
        CircleLoss()(x, x, image_ids=torch.zeros(3))
    ids = {"image_ids": torch.arange(3), "text_ids": torch.arange(6) // 2}
    with pytest.raises(ValueError, match='reduction="none" with 3 images and 6 texts'):
        MultiPositiveLoss(reduction="none")(x, y, 1.0, **ids)
    with pytest.raises(ValueError, match=r"negative_features has shape \[2, 1, 4\]: expected \[3, K, 4\]"):
        HardNegativeLoss()(x, x, 1.0, negative_features=torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="a peer needs both"):
        TripletLoss()(x, x, peer_text_features=x)
    with pytest.raises(ValueError, match="the peer embeds 6 images and 3 texts: expected 3 of both"):
        TripletLoss()(x, x, peer_image_features=y, peer_text_features=x)
