"""`ClipLoss` and `SigLipLoss` on one process: against open_clip's classes in float64, and where those cancel."""

from __future__ import annotations

import inspect

import open_clip.loss
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from pairtile.kernels import ClipLoss, SigLipLoss, use_backend

LOSSES = {"clip": (ClipLoss, open_clip.loss.ClipLoss), "siglip": (SigLipLoss, open_clip.loss.SigLipLoss)}


def value_and_gradients(loss, x, y, scale, bias, dtype):
    leaves = [tensor.detach().clone().to(dtype).requires_grad_() for tensor in (x, y, scale, bias)]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def pair_gradient_sizes(name, x, y, scale, bias):
    """sum |G_ij cos_ij| and sum |G_ij|, G = dloss/dS: what dscale and dbias are sums of, with either sign."""
    cosines = x @ y.T
    logits = (scale * cosines + bias).requires_grad_()
    n = len(x)
    if name == "clip":
        labels = torch.arange(n)
        cross_entropy = torch.nn.functional.cross_entropy
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    else:
        loss = -torch.nn.functional.logsigmoid((2 * torch.eye(n) - 1) * logits).sum() / n
    (gradient,) = torch.autograd.grad(loss, logits)
    return (gradient * cosines).abs().sum().item(), gradient.abs().sum().item()


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("n", "d"), [(1, 7), (2, 1), (33, 31), (127, 65), (301, 129)])
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_open_clip_in_float64(backend, embeddings, relative_error, name, n, d, scale):
    ours, theirs = LOSSES[name]
    x, y = embeddings(n, n, d, seed=n)
    # Truth is evaluated at the float32 inputs, so that rounding them is nobody's error.
    x, y = x.float().double(), y.float().double()
    numbers = torch.tensor(scale).double(), torch.tensor([-7.0]).double()
    truth = value_and_gradients(theirs(), x, y, *numbers, torch.float64)
    eager = value_and_gradients(theirs(), x, y, *numbers, torch.float32)
    exact = value_and_gradients(ours(), x, y, *numbers, torch.float64)
    given = value_and_gradients(ours(), x, y, *numbers, torch.float32)
    sizes = [1e-3, 1e-3, 1e-3, *pair_gradient_sizes(name, x, y, *numbers)]
    for what, *tensors, size in zip(("value", "dx", "dy", "dscale", "dbias"), truth, eager, exact, given, sizes):
        right, dense, in_double, ours_in_float = tensors
        assert in_double.shape == right.shape
        # float64 on every backend (cpp hands it to torch): only the order of summation differs.
        assert relative_error(in_double, right, size) < 1e-11, what
        # triton multiplies the scale by log2(e) before the cosines: one rounding that moves all scores alike.
        bound = max(5e-6 if backend == "triton" else 2e-6, 2 * relative_error(dense, right, size))
        assert relative_error(ours_in_float, right, size) <= bound, what


def truth_without_cancellation(x, y, scale):
    """Value and dx of the softplus form in float64, dense: dense cross-entropy cancels even there."""
    with use_backend("reference"):
        return value_and_gradients(ClipLoss(), x, y, torch.tensor(scale), torch.tensor(0.0), torch.float64)


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_well_aligned_pairs_do_not_cancel(backend, embeddings, relative_error, scale):
    x, y = (tensor.float().double() for tensor in embeddings(256, 256, 64, cosine=0.95))
    truth = truth_without_cancellation(x, y, scale)
    given = value_and_gradients(ClipLoss(), x, y, torch.tensor(scale), torch.tensor(0.0), torch.float32)
    eager = value_and_gradients(open_clip.loss.ClipLoss(), x, y, torch.tensor(scale), torch.tensor(0.0), torch.float32)
    # What remains is the rounding of S_ii, an absolute error in an exponent: once, to half an ulp, where it is taken
    # in float64 first; a few times in the dense formula's float32 product.
    bound = scale * (2.5e-7 if backend == "reference" else 8e-8)
    for k in (1, 2):
        assert relative_error(given[k], truth[k]) < bound
        assert relative_error(eager[k], truth[k]) > 10 * relative_error(given[k], truth[k])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_16_bit_features_give_a_float32_loss(backend, embeddings, relative_error, name, dtype):
    x, y = (tensor.to(dtype) for tensor in embeddings(65, 65, 32))
    loss = LOSSES[name][0]()
    truth = value_and_gradients(loss, x, y, torch.tensor(10.0), torch.tensor(-5.0), torch.float64)
    leaves = [x.requires_grad_(), y.requires_grad_()]
    value = loss(*leaves, torch.tensor(10.0), torch.tensor(-5.0))
    assert value.dtype == torch.float32
    assert relative_error(value, truth[0]) < 2e-6
    for given, right in zip(torch.autograd.grad(value, leaves), truth[1:3]):
        # The gradient is rounded to the features' dtype once: half an eps for each entry at most.
        assert relative_error(given, right) < torch.finfo(dtype).eps / 2
        assert given.dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
def test_reductions(backend, dtype, embeddings, name):
    x, y = (each.to(dtype) for each in embeddings(9, 9, 5))
    make = LOSSES[name][0]
    terms = make(reduction="none")(x, y, 4.0, -2.0)
    assert terms.shape == (9,)
    torch.testing.assert_close(terms.sum(), make(reduction="sum")(x, y, 4.0, -2.0))
    torch.testing.assert_close(terms.mean(), make()(x, y, 4.0, -2.0))
    torch.testing.assert_close(make()(x, y, torch.tensor([4.0]), torch.tensor([-2.0])), terms.mean())
    assert torch.equal(make()(x, y, 4.0, -2.0, output_dict=True)["contrastive_loss"], make()(x, y, 4.0, -2.0))


@pytest.mark.parametrize("name", LOSSES)
def test_activation_checkpointing_changes_nothing(backend, dtype, embeddings, name):
    loss, leaves = LOSSES[name][0](), [tensor.to(dtype).requires_grad_() for tensor in embeddings(9, 9, 5)]
    plain = loss(*leaves, 4.0, -2.0)
    replayed = checkpoint(loss, *leaves, 4.0, -2.0, use_reentrant=False)
    assert torch.equal(plain, replayed)
    for given, expected in zip(torch.autograd.grad(replayed, leaves), torch.autograd.grad(plain, leaves)):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_torch_compile_keeps_the_tiles_out_of_its_graph(backend, dtype, embeddings, name):
    torch.compiler.reset()
    loss, graphs = LOSSES[name][0](), []

    def remember(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=remember)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    numbers = torch.tensor([4.0]), torch.tensor(-2.0)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (*embeddings(600, 600, 3), *numbers)]
    given, expected = compiled(*leaves), loss(*leaves)
    # The same operators in the same order; what stands between them may be fused.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(given, expected, rtol=50 * eps, atol=0)
    for one, other in zip(torch.autograd.grad(given, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(one, other, rtol=5000 * eps, atol=50 * eps)
    # Unrolled, the loops over the panels of this batch make several hundred nodes.
    assert max(graphs) < 100


# The dense backend is plain PyTorch: that it compiles says nothing about us.
@pytest.mark.parametrize("backend", ["torch", "cpp"], indirect=True)
@pytest.mark.parametrize("name", LOSSES)
def test_torch_compile_and_export_take_batches_of_any_size(backend, dtype, embeddings, name):
    """The weight 1/N of a mean must not be a constant of the graph: eight such graphs, and torch gives up."""
    torch.compiler.reset()
    loss, graphs = LOSSES[name][0](), []

    def remember(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def batch(n):
        return [*(each.to(dtype) for each in embeddings(n, n, 3, seed=n)), torch.tensor([4.0]), torch.tensor(-2.0)]

    compiled = torch.compile(loss, fullgraph=True, backend=remember)
    size = torch.export.Dim("size", min=2)
    free = ({0: size}, {0: size}, None, None)
    exported = torch.export.export(loss, tuple(batch(16)), dynamic_shapes=free).module()
    for n in (12, 20, 37, 50):
        for given in (compiled(*batch(n)), exported(*batch(n))):
            torch.testing.assert_close(given, loss(*batch(n)))
    assert len(graphs) == 2, "one for the first size, one for all others"


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_has_no_mean(backend, name):
    x = torch.zeros(0, 4, requires_grad=True)
    assert LOSSES[name][0]()(x, torch.zeros(0, 4), 1.0, None).isnan()
    assert LOSSES[name][0](reduction="sum")(x, torch.zeros(0, 4), 1.0, None).item() == 0


@pytest.mark.parametrize(
    ("x", "y", "scale"),
    [
        ([[1.0]], [[torch.inf]], 2.0),
        ([[1.0]], [[2.0]], torch.inf),
        ([[1.0, 2.0], [-3.0, 1.0]], [[torch.inf, 1.0], [1.0, 1.0]], 1.0),
    ],
)
def test_an_infinite_score_of_a_pair_is_not_hidden(backend, x, y, scale):
    # softplus(LSE of the others - inf) alone would be 0; open_clip's class gives NaN too.
    assert not ClipLoss()(torch.tensor(x), torch.tensor(y), scale).isfinite()


def test_a_missing_bias_is_a_bias_of_zero(backend, dtype, embeddings):
    x, y = (each.to(dtype) for each in embeddings(8, 8, 4))
    assert torch.equal(SigLipLoss()(x, y, 3.0, None), SigLipLoss()(x, y, 3.0, torch.zeros(1)))
    assert torch.equal(ClipLoss()(x, y, 3.0), ClipLoss()(x, y, 3.0, torch.ones(1)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_are_open_clips(name, method):
    ours, theirs = (inspect.signature(getattr(cls, method)).parameters for cls in LOSSES[name])
    positional = {key: p.default for key, p in ours.items() if p.kind is not p.KEYWORD_ONLY}
    assert list(positional.items()) == [(key, p.default) for key, p in theirs.items()]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ClipLoss(strategy="rung"), "strategy='rung'"),
        (lambda: ClipLoss(reduction="avg"), "reduction='avg': expected one of mean, sum, none"),
        (lambda: ClipLoss(rank=2, world_size=2), "rank=2, world_size=2"),
        (lambda: ClipLoss(world_size=2, use_horovod=True), "use_horovod"),
        (lambda: SigLipLoss(dist_impl="tree"), "dist_impl='tree'"),
    ],
)
def test_options_that_do_not_exist_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("name", LOSSES)
def test_batches_that_do_not_fit_are_refused(name):
    loss = LOSSES[name][0]()
    with pytest.raises(ValueError, match=r"image_features \[3, 4\] and text_features \[2, 4\] differ"):
        loss(torch.zeros(3, 4), torch.zeros(2, 4), 1.0, None)
    with pytest.raises(ValueError, match=r"text_features has shape \[3\]"):
        loss(torch.zeros(3, 4), torch.zeros(3), 1.0, None)
    with pytest.raises(TypeError, match=r"text_features is list: expected a float16"):
        loss(torch.zeros(1, 1), [[1.0]], 1.0, None)
    with pytest.raises(TypeError, match=r"image_features is torch.int64"):
        loss(torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4), 1.0, None)
    with pytest.raises(ValueError, match=r"logit_scale is .* of shape \[3\]: expected a number, or a tensor of shape"):
        loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3), None)
    with pytest.raises(ValueError, match=r"logit_bias is .* of shape \[1, 1\]: expected a number"):
        loss(torch.zeros(3, 4), torch.zeros(3, 4), 1.0, torch.ones(1, 1))
    with pytest.raises(RuntimeError, match=r"world_size=2, but torch.distributed is not initialised"):
        LOSSES[name][0](world_size=2)(torch.zeros(3, 4), torch.zeros(3, 4), 1.0, None)
