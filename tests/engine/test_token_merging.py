"""Token merging from a recipe: trained, checkpointed, exported, evaluated, under every ZeRO stage."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from curves import losses
from pairtile.engine import load
from pairtile.engine.cli import app
from pairtile.engine.errors import PairtileError
from pairtile.engine.evaluation import evaluate_run, visualize_run
from pairtile.engine.export import export
from pairtile.engine.model import DualEncoder
from pairtile.engine.recipe import parse_recipe
from pairtile.engine.train import train
from pairtile.kernels.token_merging import is_patched, merged_sizes, merged_sources, tokens_per_layer, transformer_flops

VIT = {
    "model": "vit_tiny_patch16_224",
    "args": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2},
    "image_size": 16,
    "channels": 1,
}
BERT = {
    "model": "bert",
    "args": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "pool": "mean",
}
CONV = {"model": "nf_resnet26", "image_size": 16, "channels": 1}
CROSS = {"method": "crossget", "cross_tokens": True, "keep_ratio": 0.8}
R, KEEP = {"r": 3}, {"keep_ratio": 0.75}


@pytest.fixture
def merging(tiny):
    """``merging(image={"r": 3}, text={"keep_ratio": 0.75}, ...)``: the raw recipe of a ViT and a BERT."""

    def make(image=None, text=None, **changes):
        towers = {
            "model.vision": {**copy.deepcopy(VIT), "token_merging": image},
            "model.text": {**BERT, "token_merging": text},
            "eval.batch_size": 64,
        }
        return tiny(**{**towers, **changes})

    return make


def encoder_of(raw) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(parse_recipe(raw).model, vocab_size=300, pad_id=0, context_length=16).eval()


def images(count: int = 2):
    return torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("block", "left"),
    [
        ({"r": 3}, 17 - 9),
        ({"r": [4, 0, 2], "method": "pitome"}, 17 - 6),
        ({"r": 2, "inflection": -1}, 17 - 4 - 2),
        ({"keep_ratio": 0.75, "method": "crossget"}, 1 + 7),
        ({"target_tokens": 6}, 6),
    ],
)
def test_amounts_and_methods(merging, block, left):
    model = encoder_of(merging(image=block))
    model.encode_image(images())
    assert merged_sizes(model.vision).shape[1] == left


@pytest.mark.parametrize(("tower", "width", "tokens"), [("image", 32, 17), ("text", 32, 16)])
def test_a_flops_budget_is_kept(merging, tower, width, tokens):
    model = encoder_of(merging(**{tower: {"flops": 0.7}}))
    vision, ratio = tower == "image", 4.0 if tower == "image" else 2.0
    merged = (model.vision if vision else model.text).merging
    r = merged.schedule(merged.layers, tokens, 1)
    whole = transformer_flops([tokens] * (merged.layers + 1), width, ratio)
    assert 0.6 < transformer_flops(tokens_per_layer(r, tokens, 1), width, ratio) / whole <= 0.7


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_words_are_pooled_by_the_mask(merging, pool):
    """What stands in the padding, and how much there is of it, has no say."""
    model = encoder_of(merging(**{"model.text": {**BERT, "pool": pool, "token_merging": KEEP}}))
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    ids[1, :9] = ids[0, :9]
    mask = torch.arange(16) < torch.tensor([[9], [9]])
    features = model.encode_text(ids, mask)
    # float32 in 2 layers
    torch.testing.assert_close(features[0], features[1], rtol=1e-5, atol=1e-5)
    assert merged_sizes(model.text).shape[1] < 16


def test_checkpointing_merges_the_same_tokens(merging, tmp_path):
    curves = []
    for on in (False, True):
        changes = {"train.activation_checkpointing": on, "output": str(tmp_path / f"run-{on}"), "train.eval_every": 0}
        curves.append(losses(train(parse_recipe(merging(R, KEEP, **changes))).run_dir))
    # recomputation chooses the same pairs; it may pick other kernels for views, hence not bitwise
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (3, "fp32")])
def test_every_stage_trains_saves_and_merges_again(merging, stage, precision):
    partitioned = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    changes = {"train.zero_stage": stage, "train.precision": precision, "train.steps": 6}
    run = train(parse_recipe(merging(R, KEEP, deepspeed=partitioned, **changes))).run_dir
    curve = losses(run)
    assert curve[6] < curve[1]
    encoder = load(export(run, run.parent / "exported"))
    assert is_patched(encoder.model.vision)
    assert is_patched(encoder.model.text)
    encoder.encode_image(images())
    assert merged_sizes(encoder.model.vision).shape[1] == 8


def test_a_trained_model_is_evaluated_with_more_merging_and_with_none(merging):
    run = train(parse_recipe(merging(R, **{"train.steps": 2}))).run_dir
    found = [
        evaluate_run(run, overrides=[f"model.vision.token_merging={block}"], say=lambda line: None)
        for block in ("{r: 3}", "null", "{r: 6, method: pitome}")
    ]
    as_trained, whole, more = (each[0].diagnostics for each in found)
    assert as_trained != whole
    assert as_trained != more
    with pytest.raises(PairtileError, match="2 ratios for 3 layers: expected one for each"):
        evaluate_run(run, overrides=["model.vision.token_merging={keep_ratio: [0.7, 0.7]}"], say=lambda line: None)


def test_merged_regions_are_drawn(merging, tmp_path):
    run = train(parse_recipe(merging(R, **{"train.steps": 1, "eval.splits": []}))).run_dir
    invoke = CliRunner().invoke
    done = invoke(app, ["visualize", str(run), "eval.splits=null", "--count", "3", "--which", "last"])
    assert f"drawn to {run / 'merged-unseen.png'}" in done.output, done.output
    with Image.open(run / "merged-unseen.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels == (215, 48, 31)).all(-1).any(), "regions have outlines"
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, "regions have mean colours"
    more = [
        "visualize",
        str(run),
        "eval.splits=null",
        "model.vision.token_merging={r: 7}",
        "--out",
        str(tmp_path / "more.png"),
    ]
    assert invoke(app, more).exit_code == 0
    assert (tmp_path / "more.png").read_bytes() != (run / "merged-unseen.png").read_bytes()
    with pytest.raises(PairtileError, match=r"merges no tokens; say how .*token_merging='\{r: 16\}'"):
        visualize_run(run, overrides=["eval.splits=null", "model.vision.token_merging=null"])
    with pytest.raises(PairtileError, match="no split 'x' to draw from; known are unseen"):
        visualize_run(run, overrides=["eval.splits=null"], split="x")


def test_sources_are_kept_on_request(merging):
    raw = merging(R)
    model = encoder_of(raw)
    model.encode_image(images())
    with pytest.raises(ValueError, match="no sources"):
        merged_sources(model.vision)
    model.merge_tokens(model.config, trace_source=True)
    model.encode_image(images())
    assert merged_sources(model.vision).shape == (2, 17)


def test_cross_tokens_learn_from_their_divergence(merging):
    # the towers stand still: what falls is the cross tokens' own doing
    objectives = [{"name": "clip", "weight": 0.0}, {"name": "crossget"}]
    # stage 3, where a weight is there in its own module's call alone
    partitioned = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    changes = {"train.zero_stage": 3, "train.steps": 6, "model.vision.args.depth": 2, "train.lr": 3e-2}
    raw = merging(CROSS, CROSS, objectives=objectives, deepspeed=partitioned, **changes)
    run = train(parse_recipe(raw)).run_dir
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    divergence = [line["loss/crossget"] for line in lines if line["kind"] == "train"]
    assert divergence[-1] < 0.8 * divergence[0]
    encoder = load(run)
    assert encoder.model.image_cross.weight.abs().amax(1).min() > 1e-3, "every layer's"
    assert encoder.encode_image(images()).shape == (2, 32)
    with pytest.raises(PairtileError, match="objective crossget needs the cross tokens of two towers"):
        train(parse_recipe(merging(CROSS, None, objectives=objectives, resume="never", **changes)))


def test_cross_tokens_of_a_clip_are_the_means_of_its_frames(merging):
    changes = {"data.frames": 4, "model.vision.args.depth": 2}
    recipe = parse_recipe(merging(CROSS, CROSS, **changes))
    model = DualEncoder(recipe.model, vocab_size=300, pad_id=0, context_length=16, frames=4).eval()
    words = torch.randint(3, 300, (2, 16))
    clips = images().unsqueeze(1).repeat(1, 4, 1, 1, 1)
    with torch.no_grad():
        model.frame_positions.weight.zero_()
        still = model(clips, words, torch.ones_like(words, dtype=torch.bool))
        (first,) = model(clips[:1], words[:1], torch.ones_like(words[:1], dtype=torch.bool)).image_cross
    assert still.image_cross.shape == still.text_cross.shape == (2, 2, 32)
    # float32 in 2 layers, other batches in one product
    torch.testing.assert_close(still.image_cross[0], first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"r": 3, "flops": 0.5}}, r"model.vision.token_merging: give one of r, .*, not r and flops"),
        ({"image": {}}, "give one of r, .*, not none"),
        ({"image": {"r": [1, 2], "inflection": 1}}, "inflection goes with a single r"),
        ({"image": {"r": 3, "method": "tempme"}}, "tempme and clips go together"),
        ({"image": {"keep_ratio": 0.3}}, "model.vision.token_merging: ratio=0.3: expected shares from 0.5 to 1"),
        ({"image": {"r": 3, "method": "tempme", "clips": {"join": {1: 2}}}}, r"set data\.frames"),
        ({"model.vision": {**CONV, "token_merging": {"flops": 0.5}}}, "a NormFreeNet does not say how wide"),
        ({"model.vision": {**CONV, "token_merging": CROSS}}, r"cross_tokens: a NormFreeNet does not say how wide"),
        ({"model.text": {"model": "clip_text_model", "token_merging": {"r": 2}}}, "a CLIPTextModel of transformers"),
    ],
)
def test_what_does_not_fit_is_one_line(merging, changes, message):
    with pytest.raises(PairtileError, match=message) as caught:
        encoder_of(merging(**changes))
    assert "\n" not in str(caught.value)
