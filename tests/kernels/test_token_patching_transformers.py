"""transformers' towers whose layers merge tokens: small random ones of every family that `patch` knows."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from pairtile.kernels.token_merging import FlopsBudget, merged_sizes, merged_sources, patch, unpatch

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
PICTURES = {"image_size": 16, "patch_size": 4}
VISION = {
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig, {}, 1),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig, {}, 0),
    "vit": (transformers.ViTModel, transformers.ViTConfig, {}, 1),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, {"use_mask_token": False}, 1),
    "registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        {"num_register_tokens": 3},
        4,
    ),
}
TEXT = {
    "bert": (transformers.BertModel, transformers.BertConfig),
    "roberta": (transformers.RobertaModel, transformers.RobertaConfig),
}


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def vision_model(family: str, attention: str = "sdpa") -> tuple[nn.Module, int]:
    kind, config, options, prefix = VISION[family]
    return shaken(kind._from_config(config(**SIZES, **PICTURES, **options), attn_implementation=attention)), prefix


def text_model(family: str, attention: str = "sdpa") -> nn.Module:
    kind, config = TEXT[family]
    config = config(**SIZES, vocab_size=50, max_position_embeddings=40, pad_token_id=1)
    return shaken(kind._from_config(config, attn_implementation=attention))


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def texts(lengths: tuple[int, ...] = (16, 9, 4), padding: int = 0) -> dict[str, Tensor]:
    """Right-padded ids and their mask."""
    longest = max(lengths) + padding
    ids = torch.randint(2, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    ids = nn.functional.pad(ids, (0, padding), value=1)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", VISION)
def test_vision_towers(family, attention):
    model, prefix = vision_model(family, attention)
    before, names = model(images()), list(model.state_dict())
    kinds = [type(each) for each in model.modules()]
    patch(model, 0)
    after = model(images())
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    assert torch.equal(after.pooler_output, before.pooler_output)
    patch(unpatch(model), [5, 0, 4], trace_source=True)
    assert list(model.state_dict()) == names
    merged = model(images(), output_hidden_states=True)
    assert [each.shape[1] for each in merged.hidden_states] == [prefix + each for each in (16, 11, 11, 7)]
    assert torch.equal(merged_sources(model)[:, :prefix], torch.arange(prefix).expand(2, -1))
    merged.pooler_output.square().sum().backward()
    idle = {"embeddings.mask_token", "layernorm.weight", "layernorm.bias"}
    for name, parameter in model.named_parameters():
        assert name in idle or parameter.grad is None or parameter.grad.isfinite().all(), name
    assert [type(each) for each in unpatch(model).modules()] == kinds
    assert torch.equal(model(images()).last_hidden_state, before.last_hidden_state)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["clip", "siglip", "registers"])
def test_equal_tokens_merge_without_a_trace(family, attention):
    model, prefix = vision_model(family, attention)
    model = model.double()
    for name, parameter in model.named_parameters():
        if "position_embedding" in name:
            nn.init.zeros_(parameter)
    image = images().double()[:, :, :, :4].repeat(1, 1, 1, 4)
    whole = model(image).pooler_output
    merged = patch(model, [4, 3, 0])(image)
    assert merged.last_hidden_state.shape[1] == 9 + prefix
    # Rounding of float64; transformers takes the softmax of "eager" in float32.
    close = 1e-9 if attention == "sdpa" else 1e-5
    torch.testing.assert_close(merged.pooler_output, whole, rtol=close, atol=close)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TEXT)
def test_text_towers(family, attention):
    model = text_model(family, attention)
    before = model(**texts())
    assert torch.equal(patch(model, 0)(**texts()).last_hidden_state, before.last_hidden_state)
    patch(unpatch(model), 3, trace_source=True)
    merged = model(**texts())
    assert merged.last_hidden_state.shape == (3, 7, 24)
    # The words of every text, each counted once, and no padding.
    assert merged_sizes(model).sum((1, 2)).tolist() == [16, 9, 4]
    assert (merged_sources(model)[:, 0] == 0).all()
    merged.pooler_output.square().sum().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    assert torch.equal(unpatch(model)(**texts()).last_hidden_state, before.last_hidden_state)


@pytest.mark.parametrize("method", ["tome", "pitome", "crossget"])
def test_padding_leaves_no_trace(method):
    """One text twice, with other ids in its padding."""
    model = text_model("bert").double()
    padded = texts((9, 9), padding=8)
    padded["input_ids"][1, :9] = padded["input_ids"][0, :9]
    padded["input_ids"][1, 9:] = 33
    alone = model(padded["input_ids"][:, :9])
    patch(model, [4, 3, 0], method=method)
    merged = model(**padded)
    assert merged.last_hidden_state.shape[1] == 10
    torch.testing.assert_close(merged.pooler_output[0], merged.pooler_output[1], rtol=1e-9, atol=1e-9)
    sizes = merged_sizes(model)
    assert sizes.sum(1).squeeze(-1).tolist() == [9, 9]
    if method == "crossget":
        # As many tokens fewer as there is padding but one: what is left is the text alone.
        assert sizes.max() == 1
        torch.testing.assert_close(merged.pooler_output, alone.pooler_output, rtol=1e-9, atol=1e-9)


def test_restored_texts_fit_their_mask():
    model = patch(text_model("bert"), 3, restore=True)
    assert model(**texts()).last_hidden_state.shape == (3, 16, 24)


def test_checkpointing_chooses_the_same_pairs():
    model = patch(text_model("bert"), FlopsBudget(0.8, 24, 2.0))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        losses = [model(**texts(each)).last_hidden_state.square().sum() for each in ((16, 9), (12, 5))]
        sum(losses).backward()
        results.append([*losses, *(each.grad.clone() for each in model.parameters() if each.grad is not None)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_patched_is_told():
    config = transformers.CLIPConfig(text_config={**SIZES, "vocab_size": 50}, vision_config={**SIZES, **PICTURES})
    whole = transformers.CLIPModel(config)
    with pytest.raises(TypeError, match=r"give that, such as clip\.vision_model"):
        patch(whole, 1)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        patch(text_model("bert", "flex_attention"), 1)
    with pytest.raises(ValueError, match="is a decoder"):
        patch(transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=50, is_decoder=True)), 1)
