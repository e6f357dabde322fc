import math

import open_clip
import pytest
import torch
from torch import nn

from pairtile.engine.errors import PairtileError
from pairtile.engine.export import build_model
from pairtile.engine.model import DualEncoder
from pairtile.engine.presets import PRESETS
from pairtile.engine.recipe import ModelConfig, TextConfig, parse_recipe
from pairtile.engine.towers import build_text, pool_hidden_states

SIZES = {"vocab_size": 300, "pad_id": 0, "context_length": 16}


class Pixels(nn.Module):
    """A tower that a recipe names by import path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16 * 16, width)

    def forward(self, images):
        return self.linear(images.flatten(1))


class Words(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, width)

    def forward(self, input_ids, attention_mask):
        return self.embedding(input_ids)


def small(tiny, **changes) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(parse_recipe(tiny(**changes)).model, **SIZES)


def batch(n: int = 3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 1, 16, 16), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(3, 300, (n, 16), generator=generator)
    mask = torch.arange(16) < torch.tensor([16, 5, 1])[:n, None]
    return images, input_ids, mask


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-L-14"])
def test_presets_have_the_parameters_of_open_clip(name):
    with torch.device("meta"):
        ours = DualEncoder(ModelConfig(**PRESETS[name]), vocab_size=49408, pad_id=0, context_length=77)
        theirs = open_clip.model.CLIP(**{k: v for k, v in open_clip.get_model_config(name).items()})

    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    assert count(ours) == count(theirs)
    assert count(ours.vision) + count(ours.vision_projection) == count(theirs.visual)


def test_features_are_float32_of_unit_length_and_padding_is_ignored(tiny):
    model = small(tiny).eval()
    images, input_ids, mask = batch()
    output = model(images, input_ids, mask)
    for features in output[:2]:
        assert features.dtype == torch.float32
        assert torch.allclose(features.norm(dim=1), torch.ones(3))
    other = torch.where(mask, input_ids, 7)
    # the same tokens with other padding: equal to rounding, which may differ between attention masks
    assert torch.allclose(model.encode_text(other, mask), output.text_features, atol=1e-6)


def test_normalisation_of_pixels(tiny):
    model = small(tiny)
    seen = []
    model.vision.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = batch()[0]
    model.encode_image(images)
    assert torch.allclose(seen[0], (images / 255 - 0.9) / 0.25, atol=1e-5)


def test_scale_is_bounded_and_can_come_back(tiny):
    model = small(tiny)
    assert model.scale().item() == pytest.approx(1 / 0.07)
    model.logit_scale.data.fill_(math.log(250))
    assert model.scale().item() == pytest.approx(100)
    for direction, expected in ((1.0, True), (-1.0, False)):
        model.logit_scale.grad = None
        (direction * model.scale()).sum().backward()
        assert bool(model.logit_scale.grad != 0) is expected


def test_frozen_tower_gets_no_gradient_and_stays_in_evaluation_mode(tiny):
    model = small(tiny, **{"model.vision.frozen": True}).train()
    model(*batch()).image_features.sum().backward()
    assert all(parameter.grad is None for parameter in model.vision.parameters())
    assert model.vision_projection.weight.grad is not None
    assert not model.vision.training
    assert model.text.training


@pytest.mark.parametrize("pool", ["last", "first", "mean"])
def test_pooling(pool):
    hidden = torch.randn(3, 5, 4)
    lengths = [5, 2, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    expected = {
        "last": lambda row, n: row[n - 1],
        "first": lambda row, n: row[0],
        "mean": lambda row, n: row[:n].mean(0),
    }[pool]
    wanted = torch.stack([expected(row, n) for row, n in zip(hidden, lengths)])
    assert torch.allclose(pool_hidden_states(hidden, mask, pool), wanted, atol=1e-6)


def test_towers_by_import_path(tiny):
    vision = {"target": f"{__name__}:Pixels", "args": {"width": 24}, "out_dim": 24, "image_size": 16, "channels": 1}
    text = {"target": f"{__name__}:Words", "args": {"width": 20}, "out_dim": 20, "pool": "mean"}
    model = small(tiny, model={"vision": vision, "text": text, "embed_dim": 8})
    assert model(*batch()).text_features.shape == (3, 8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.vision.model": "nosuch_net"}, "model.vision: timm model nosuch_net"),
        ({"model.vision.args": {"nosuch": 1}}, "model.vision: timm model"),
        ({"model.text.model": "nosuch"}, "model.text: transformers model nosuch"),
        ({"model.text.args": {"vocab_size": 10}}, "the tokenizer has 300 tokens"),
        ({"model.text.args": {"max_position_embeddings": 3}}, "the text tower has 3 positions"),
        (
            {"model.vision.model": None, "model.vision.target": "nosuch:Net", "model.vision.out_dim": 4},
            "could not be built",
        ),
    ],
)
def test_wrong_towers_are_one_line(tiny, changes, expected):
    with pytest.raises(PairtileError, match=expected) as caught:
        small(tiny, **changes)
    assert "\n" not in str(caught.value)


def test_text_tower_from_a_local_folder_is_described_without_it(tiny, tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    stored = BertModel(BertConfig(vocab_size=300, max_position_embeddings=16, **sizes))
    stored.save_pretrained(tmp_path / "bert")
    changes = {"model.text": {"model": str(tmp_path / "bert"), "pretrained": True, "pool": "first"}}
    model = small(tiny, **changes)
    assert torch.equal(model.text.embeddings.word_embeddings.weight, stored.embeddings.word_embeddings.weight)
    assert model.config.text.model == "bert"
    again, width = build_text(TextConfig(**{**model.config.text.model_dump(), "pretrained": False}), **SIZES)
    assert width == 32
    assert {name: p.shape for name, p in again.named_parameters()} == {
        n: p.shape for n, p in model.text.named_parameters()
    }


def test_activation_checkpointing_needs_a_switch(tiny):
    vision = {"target": f"{__name__}:Pixels", "args": {"width": 24}, "out_dim": 24, "image_size": 16, "channels": 1}
    model = small(tiny, **{"model.vision": vision})
    with pytest.raises(PairtileError, match="set_grad_checkpointing"):
        model.enable_activation_checkpointing()


def test_build_model_takes_sizes_from_the_tokenizer(tiny, glyph_shards):
    from pairtile.engine.data import load_tokenizer

    recipe = parse_recipe(tiny())
    tokenizer = load_tokenizer(str(glyph_shards))
    model = build_model(recipe.model, recipe.data, tokenizer)
    assert model.text.config.vocab_size == tokenizer.vocab_size
