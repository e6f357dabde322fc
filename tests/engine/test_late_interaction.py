"""Models with token embeddings: what their towers give, that they train by FILIP's loss, and what others load."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from curves import losses
from pairtile.engine import load
from pairtile.engine.cli import app
from pairtile.engine.errors import PairtileError
from pairtile.engine.export import export
from pairtile.engine.model import DualEncoder
from pairtile.engine.recipe import parse_recipe
from pairtile.engine.tokens import patch_tokens
from pairtile.engine.train import train
from pairtile.kernels import maxsim

SIZES = {"vocab_size": 300, "pad_id": 0, "context_length": 16, "special_ids": [0, 1, 2]}
TOKENS = {"model.tokens": {"dim": 24}, "model.embed_dim": None}
FILIP = {**TOKENS, "objectives": [{"name": "filip"}]}
VIT = {
    "model": "vit_tiny_patch16_224",
    "args": {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "image_size": 16,
    "channels": 1,
    "mean": [0.9],
    "std": [0.25],
}


class Vectors(nn.Module):
    """A tower that pools, by import path."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def small(tiny: Any, **changes: Any) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(parse_recipe(tiny(**changes)).model, **SIZES).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(3, 300, (3, 16), generator=generator)
    lengths = torch.tensor([16, 5, 2])
    input_ids[:, 0] = 1
    input_ids[torch.arange(3), lengths - 1] = 2
    return images, input_ids, torch.arange(16) < lengths[:, None]


def test_tokens_are_unit_vectors_and_pooled_embeddings_their_means(tiny):
    model = small(tiny, **TOKENS)
    images, input_ids, mask = batch()
    output = model(images, input_ids, mask)
    assert output.image_tokens.shape == (3, 4, 24)  # the last map is 2 x 2
    assert output.text_tokens.shape == (3, 16, 24)
    assert torch.equal(output.text_mask, mask)
    for tokens in (output.image_tokens, output.text_tokens):
        assert tokens.dtype == torch.float32
        torch.testing.assert_close(tokens.norm(dim=2), torch.ones(tokens.shape[:2]))
    for row in range(3):
        expected = nn.functional.normalize(output.text_tokens[row][mask[row]].mean(0), dim=0)
        torch.testing.assert_close(output.text_features[row], expected)
    expected = nn.functional.normalize(output.image_tokens.mean(1), dim=1)
    torch.testing.assert_close(output.image_features, expected)
    assert torch.equal(model.encode_image_tokens(images).tokens, output.image_tokens)
    raw = model.encode_text_tokens(input_ids, mask, normalize=False).tokens
    torch.testing.assert_close(nn.functional.normalize(raw, dim=2), output.text_tokens)


def test_pooled_embeddings_of_their_own_are_those_of_a_model_without_tokens(tiny):
    plain = small(tiny)
    both = small(tiny, **{"model.tokens": {"dim": 24}})
    both.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in both.state_dict().keys() - plain.state_dict().keys()} == {
        "patch_projection",
        "word_projection",
    }
    for found, expected in zip(both(*batch())[:4], plain(*batch())[:4]):
        assert found is expected is None or torch.equal(found, expected)


def test_special_tokens_are_left_out_on_request_but_never_all_of_a_text(tiny):
    model = small(tiny, **{"model.tokens": {"dim": 24, "special_tokens": False}})
    _, input_ids, mask = batch()
    found = model.encode_text_tokens(input_ids, mask).mask
    # <bos> at the front and <eos> at the end; the last text has nothing else
    assert found.sum(1).tolist() == [14, 3, 2]
    assert not found[:2, 0].any()


def test_class_tokens_are_patches_on_request_and_maps_may_have_their_channels_last(tiny):
    for prefix, count in ((False, 16), (True, 17)):
        model = small(tiny, **{"model.vision": VIT, "model.tokens": {"dim": 8, "prefix_tokens": prefix}})
        assert model.encode_image_tokens(batch()[0]).tokens.shape == (3, count, 8)
    image_map = torch.randn(2, 5, 3, 4)
    rows = patch_tokens(image_map, nn.Identity(), 5, prefix_tokens=False)
    assert torch.equal(rows[1, 7], image_map[1, :, 1, 3])
    swapped = SimpleNamespace(output_fmt="NHWC")
    assert torch.equal(patch_tokens(image_map, swapped, 4, prefix_tokens=False)[1, 5], image_map[1, 1, 2])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, glyph_shards):
    from tiny_recipe import TINY

    raw = json.loads(json.dumps(TINY))
    raw["output"] = str(tmp_path_factory.mktemp("filip") / "run")
    raw["data"] |= {"root": str(glyph_shards), "pad_to": "longest"}
    raw["model"] |= {"embed_dim": None, "tokens": {"dim": 24}}
    raw["objectives"] = [{"name": "filip", "args": {"token_dtype": "bfloat16"}}]
    raw["train"] |= {"steps": 12, "precision": "bf16", "zero_stage": 2, "accumulation": 2}
    raw["train"]["activation_checkpointing"] = True
    return train(parse_recipe(raw))


def test_a_recipe_trains_and_its_scores_are_late_interaction(trained, tmp_path):
    curve = losses(trained.run_dir)
    assert curve[12] < curve[1]
    document = json.loads((trained.run_dir / "eval" / "step-00000012" / "results.json").read_text())
    assert document["splits"]["unseen"]["scores"] == "tokens"
    arguments = ["evaluate", str(trained.run_dir), "--which", "last", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--scores", "rerank", "--rerank-top", "7"])
    assert done.exit_code == 0, done.output
    assert "scored by late interaction of the 7 best by pooled embeddings" in done.output
    found = json.loads((tmp_path / "results.json").read_text())["splits"]["unseen"]
    assert (found["scores"], found["rerank_top"]) == ("rerank", 7)


def test_an_exported_model_gives_the_tokens_that_are_scored(trained, tmp_path):
    encoder = load(export(trained.run_dir, tmp_path / "model", which="last"))
    images = batch()[0]
    texts = ["GREEK SMALL LETTER ALPHA", "arrow", ""]
    patches, words = encoder.encode_image_tokens(images), encoder.encode_text_tokens(texts, batch_size=2)
    assert patches.mask.all()
    assert words.tokens.shape == (3, 16, 24)
    assert words.mask.sum(1).tolist() == encoder.tokenizer.encode(texts, 16)[1].sum(1).tolist()
    assert maxsim(words.tokens, patches.tokens, words.mask, patches.mask, aggregate="mean").shape == (3, 3)
    model = load(trained.run_dir, which="last").model
    assert torch.equal(model.encode_image_tokens(images).tokens, patches.tokens)
    assert encoder.encode_text(texts).shape == (3, 24)


def test_global_and_token_losses_add_up_under_zero_3_with_a_transformer(tiny):
    """Parameters that the tower owns itself (positions, class token) are gathered in its own hooks."""
    objectives = [{"name": "clip"}, {"name": "filip", "weight": 0.5}]
    changes = {"model.vision": VIT, "model.tokens": {"dim": 24}, "train.steps": 3, "train.lr": 1e-3}
    changes["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    curves = []
    for stage in (0, 3):
        blocks = changes if stage == 3 else {**changes, "deepspeed": {}}
        output = f"{tiny()['output']}-{stage}"
        result = train(
            parse_recipe(tiny(output=output, objectives=objectives, **blocks, **{"train.zero_stage": stage}))
        )
        curves.append(losses(result.run_dir))
        line = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[0])
        assert line["loss"] == pytest.approx(line["loss/clip"] + line["loss/filip"])
    # as between the stages of test_ranks.py
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.embed_dim": None}, "embed_dim is null and there are no tokens to average"),
        ({"eval.scores": "rerank"}, "eval.scores is rerank, but the model has no token embeddings: set model.tokens.dim"),
        ({"model.tokens": {"width": 8}}, "unknown key model.tokens.width"),
        ({"objectives": [{"name": "filip"}]}, r"objective filip needs token embeddings: set model\.tokens\.dim"),
        ({**FILIP, "objectives": [{"name": "filip", "args": {"token_dtype": "int8"}}]}, "token_dtype='int8': expected"),
        (
            {
                **TOKENS,
                "model.vision": {
                    "target": f"{__name__}:Vectors", "out_dim": 256, "image_size": 16, "channels": 1,
                },
            },
            r"the image tower Vectors gives features of shape \[1, 256\]; expected a sequence",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(tiny, changes, expected):
    with pytest.raises(PairtileError, match=expected):
        train(parse_recipe(tiny(**changes)))


def test_a_pooled_model_has_no_tokens_to_give(tiny):
    with pytest.raises(PairtileError, match=r"no token embeddings; train one whose recipe sets model\.tokens\.dim"):
        small(tiny).encode_image_tokens(batch()[0])
