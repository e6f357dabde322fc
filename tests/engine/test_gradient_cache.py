"""Gradient caching against the same chunks forwarded with their graphs kept, and against the batch in one pass."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curves import losses
from pairtile.engine import GradientCache
from pairtile.engine.errors import PairtileError
from pairtile.engine.recipe import parse_recipe
from pairtile.engine.reduce_once import Reduction
from pairtile.engine.train import train
from pairtile.kernels import ClipLoss, CoCaLoss, FilipLoss, MultiPositiveLoss
from pairtile.kernels.token_merging import patch
from two_ranks import on_two_ranks
from two_towers import ROWS, TwoTowers, pairs


def chunked_with_graphs(model, inputs, chunk):
    """Outputs of all rows, with every chunk's graph."""
    outputs = [model(*part) for part in zip(*(tensor.split(chunk) for tensor in inputs))]
    shared = ("logit_scale", "vocab_weight")
    return {name: outputs[0][name] if name in shared else torch.cat([o[name] for o in outputs]) for name in outputs[0]}


def clip_and_filip(output):
    scale = output["logit_scale"]
    clip = ClipLoss()(output["image_features"], output["text_features"], scale)
    tokens = output["image_tokens"], output["text_tokens"]
    return clip + 0.5 * FilipLoss()(*tokens, scale, text_mask=output["text_mask"])


def captioning(output):
    features = output["image_features"], output["text_features"]
    args = {"hidden_states": output["text_tokens"], "vocab_weight": output["vocab_weight"]}
    labels = torch.arange(ROWS * 5).view(ROWS, 5) % 7
    loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)
    return sum(loss(*features, None, labels, output["logit_scale"], **args))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("loss_of", [clip_and_filip, captioning])
@pytest.mark.parametrize(
    ("chunk", "dtype"), [(ROWS, torch.float64), (5, torch.float64), (3, torch.float64), (3, torch.float32)]
)
def test_gradients_are_those_of_the_chunks_with_their_graphs(loss_of, chunk, dtype):
    """1, 2 and 4 chunks, the last of which has one row; dropout on."""
    torch.manual_seed(0)
    model, inputs = TwoTowers().to(dtype), pairs(dtype)
    torch.manual_seed(1)
    expected = loss_of(chunked_with_graphs(model, inputs, chunk))
    expected.backward()
    drawn, wanted = torch.rand(1), gradients(model)
    model.zero_grad()
    torch.manual_seed(1)
    cache = GradientCache(model, chunk, shared=("logit_scale", "vocab_weight"))
    loss = loss_of(cache(*inputs))
    assert not gradients(model)
    cache.backward(loss)
    assert torch.equal(drawn, torch.rand(1))  # the generator is where one pass would have left it
    assert torch.equal(loss.detach(), expected.detach())
    # the same terms; chunks are added in another order
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}[dtype]
    for name, gradient in gradients(model).items():
        error = (gradient - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < tolerance, name
    assert gradients(model).keys() == wanted.keys()
    assert wanted["logit_scale"].abs() > 1e-3  # once a chunk it would be wrong by as much


def test_accumulation_autocast_frozen_towers_and_outputs_that_no_loss_reads():
    torch.manual_seed(0)
    model, inputs = TwoTowers(dropout=0.0), pairs(torch.float32)
    model.text.requires_grad_(False)
    halves = [[tensor[:5] for tensor in inputs], [tensor[5:] for tensor in inputs]]

    def loss_of(output):
        return ClipLoss()(output["image_features"], output["text_features"], output["logit_scale"]) / 2

    with torch.autocast("cpu", torch.bfloat16):
        for half in halves:
            loss_of(model(*half)).backward()
    wanted = gradients(model)
    model.zero_grad()
    cache = GradientCache(model, 2, shared=("logit_scale", "vocab_weight"))
    with torch.autocast("cpu", torch.bfloat16):  # one context around both passes keeps casts of weights
        for half in halves:
            cache.backward(loss_of(cache(*half)), last=half is halves[1])
    assert gradients(model).keys() == wanted.keys()
    for name, gradient in gradients(model).items():
        # products of weights' gradients are rounded to bfloat16 once a chunk, 2^-9 each
        assert (gradient - wanted[name]).norm() / wanted[name].norm() < 1e-2, name


def test_two_ranks_reduce_once_and_agree_with_one_process(tmp_path):
    """Chunks of 3: as many on both ranks, 3 and 2, and 2 and a blank one."""
    cases = [(6, 6), (8, 4), (5, 0)]
    results = on_two_ranks(Path(__file__).with_name("gradient_cache_worker.py"), cases, tmp_path)
    for number, shards in enumerate(cases):
        torch.manual_seed(0)
        model = TwoTowers(dropout=0.0).double()
        output = model(*pairs(torch.float64, sum(shards)))
        loss = ClipLoss()(output["image_features"], output["text_features"], output["logit_scale"])
        (loss + 0.1 * output["vocab_weight"].square().sum()).backward()
        for rank in range(2):
            found = results[rank][number]
            assert found["reduced"] == found["buckets"]
            for name, gradient in found["gradients"].items():
                torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=0, atol=1e-12, msg=name)


class Merged(nn.Module):
    """A vision transformer whose tokens are merged, and a linear text tower; a named tuple."""

    class Output(NamedTuple):
        image_features: Tensor
        text_features: Tensor
        logit_scale: Tensor

    def __init__(self):
        import timm

        super().__init__()
        sizes = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2, "drop_path_rate": 0.3}
        self.image = timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=1, **sizes)
        self.text = nn.Linear(12, 32)
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, images, texts):
        features = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return self.Output(*features, self.logit_scale.exp())


def test_merged_tokens_are_chosen_alike_when_embedded_again():
    torch.manual_seed(0)
    model = Merged().double()
    patch(model.image, r=3)
    inputs = torch.randn(6, 1, 16, 16, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 0, 3, 4])
    loss_of = MultiPositiveLoss()
    torch.manual_seed(1)
    parts = [model(*(tensor[rows] for tensor in inputs)) for rows in (slice(0, 4), slice(4, 6))]
    features = [torch.cat(each) for each in list(zip(*parts))[:2]]
    loss_of(*features, parts[0].logit_scale, image_ids=ids, text_ids=ids).backward()
    wanted = gradients(model)
    model.zero_grad()
    torch.manual_seed(1)
    cache = GradientCache(model, 4)
    output = cache(images=inputs[0], texts=inputs[1])
    assert isinstance(output, Merged.Output)
    cache.backward(loss_of(*output, image_ids=ids, text_ids=ids))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-12, msg=name)


def test_batch_statistics_are_refused_and_frozen_ones_are_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    cache = GradientCache(model, 2)
    with pytest.raises(
        PairtileError, match=r"1 is a BatchNorm1d that takes the statistics of its batch.*evaluation mode"
    ):
        cache(torch.ones(4, 4))
    model.eval()
    cache.backward(cache(torch.ones(4, 4)).sum())
    model[1] = nn.BatchNorm1d(4, track_running_stats=False).eval()
    with pytest.raises(PairtileError, match="BatchNorm1d"):
        cache(torch.ones(4, 4))


@pytest.mark.parametrize("kind", ["spectral norm", "running mean"])
def test_buffers_that_a_forward_changes_are_refused(kind):
    class Centred(nn.Linear):
        def forward(self, x):
            found = super().forward(x)
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * found.detach().mean(0)
            return found - self.mean

    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)) if kind == "spectral norm" else Centred(4, 4)
    model.register_buffer("mean", torch.zeros(4))
    with pytest.raises(PairtileError, match=r"changes its buffer (mean|parametrizations\.weight).*evaluation mode"):
        GradientCache(model, 2)(torch.ones(4, 4))
    GradientCache(model.eval(), 2)(torch.ones(4, 4))


def test_the_second_pass_is_not_under_an_autocast_that_the_first_was_not_under():
    seen = []
    linear = nn.Linear(4, 4)
    cache = GradientCache(lambda x: seen.append(linear(x)) or seen[-1], 2)
    loss = cache(torch.ones(4, 4)).sum()
    with torch.autocast("cpu", torch.bfloat16):
        cache.backward(loss)
    assert [output.dtype for output in seen] == [torch.float32] * 4


@dataclass(frozen=True)
class Found:
    features: Tensor
    scale: Tensor | None = None


def test_outputs_may_be_dataclasses_but_no_strangers():
    linear = nn.Linear(4, 4)
    cache = GradientCache(lambda x: {"found": Found(linear(x))}, 3)
    found = cache(torch.ones(4, 4))["found"]
    assert isinstance(found, Found)
    assert found.scale is None
    cache.backward(found.features.sum())
    assert torch.equal(linear.weight.grad, torch.full((4, 4), 4.0))
    with pytest.raises(ValueError, match="returned SimpleNamespace, in which there is no tensor with a row"):
        GradientCache(lambda x: SimpleNamespace(features=linear(x)), 3)(torch.ones(4, 4))


def test_every_rank_runs_as_many_chunks_however_few_its_rows():
    seen = []
    model = nn.Linear(4, 4)
    cache = GradientCache(lambda x, mask: seen.append((x.tolist(), mask.tolist())) or model(x), 2, chunks=3)
    for rows in (5, 1, 0):
        seen.clear()
        output = cache(torch.ones(rows, 4), torch.zeros(rows, dtype=torch.bool))
        assert output.shape == (rows, 4)
        assert [len(x) for x, _ in seen] == {5: [2, 2, 1], 1: [1, 1, 1], 0: [1, 1, 1]}[rows]
        cache.backward(output.sum())
        assert len(seen) == 6
    assert seen[0] == ([[0.0] * 4], [True])  # attention needs a token to attend to
    assert model.weight.grad.sum() == 4 * 4 * 6


def test_misuse_says_what_was_expected():
    cache = GradientCache(nn.Linear(4, 4), 2)
    with pytest.raises(RuntimeError, match="call the GradientCache first"):
        cache.backward(torch.ones(()))
    with pytest.raises(ValueError, match=r"the tensors given have \[3, 4\] rows"):
        cache(torch.ones(3, 4), torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"has shape \[4\] for a chunk of 2 rows; expected \[2\].*shared="):
        GradientCache(lambda x: x.sum(0), 2)(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"chunk=0"):
        GradientCache(nn.Linear(4, 4), 0)

    class Engine:
        def zero_optimization_stage(self):
            return 2

        def gradient_accumulation_steps(self):
            return 4

        coalesce_grad_reduction = None

    with pytest.raises(PairtileError, match=r"gradient_accumulation_steps is 4, expected 1; .* last=False"):
        Reduction.of(Engine())


def test_a_recipe_with_chunks_has_the_curve_of_one_without(tiny):
    """Three chunks of 11, 11 and 10 pairs, two objectives, accumulation."""
    changes = {
        "objectives": [{"name": "clip"}, {"name": "filip", "weight": 0.5}],
        "model.tokens": {"dim": 24},
        "train.accumulation": 2,
        "train.warmup_steps": 3,
        "eval.splits": [],
    }
    curves = {}
    for chunk in (None, 11):
        raw = tiny(**changes, **{"train.cache_chunk": chunk})
        raw["output"] += str(chunk)
        curves[chunk] = losses(train(parse_recipe(raw)).run_dir)
    assert len(curves[None]) == 4
    # float32 in another order, through Adam, whose first steps have the size lr whatever the gradient's: hence the warm-up
    assert curves[11] == pytest.approx(curves[None], rel=1e-5)


def test_a_recipe_whose_tower_normalises_over_the_batch_is_refused_before_it_starts(tiny):
    vision = {"model": "resnet18", "args": {}, "image_size": 16, "channels": 1, "mean": [0.9], "std": [0.25]}
    raw = tiny(**{"model.vision": vision, "train.cache_chunk": 8})
    with pytest.raises(PairtileError, match=r"cache_chunk\): vision\.bn1 is a BatchNorm2d"):
        train(parse_recipe(raw))
    raw["model"]["vision"]["frozen"] = True
    raw["train"]["steps"] = 1
    train(parse_recipe(raw))
