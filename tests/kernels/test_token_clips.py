"""TempMe in a tower: frames that become clips between layers, and merge across them."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from pairtile.kernels.token_merging import ClipMerging, merged_sizes, merged_sources, patch

TIMM = {"vit": "vit_tiny_patch16_224", "gap": "vit_base_patch16_siglip_gap_224", "eva": "eva02_tiny_patch14_224"}


def tower(family: str) -> nn.Module:
    """Three layers over 16 patches, weights that are not as small as an untrained model's."""
    torch.manual_seed(1)
    if family == "clip":
        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=4))
    else:
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
        model = timm.create_model(TIMM[family], **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def videos(count: int, frames: int, still: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 1 if still else frames, 3, 16, 16)
    return torch.randn(shape, generator=generator, dtype=torch.float64).expand(-1, frames, -1, -1, -1).flatten(0, 1)


def features(model: nn.Module, images: Tensor) -> Tensor:
    found = model(images)
    return found if isinstance(found, Tensor) else found.pooler_output


@pytest.mark.parametrize("family", [*TIMM, "clip"])
def test_a_still_video_is_one_frame(family):
    """Every patch merges with itself in the neighbouring frame, and attention counts it as often."""
    model = tower(family)
    alone = features(model, videos(2, 1, still=True))
    patch(model, 0, clips=ClipMerging(4, {1: 2, 2: 2}, keep_across=0.5, keep_within=1.0))
    found = features(model, videos(2, 4, still=True))
    assert found.shape == alone.shape
    # Rounding of float64 over three layers.
    torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-9)
    assert (merged_sizes(model) == 4).all()


@pytest.mark.parametrize("family", ["vit", "eva"])
def test_token_counts_sources_and_gradients(family):
    model = patch(tower(family), 2, clips=ClipMerging(4, {1: 2}, keep_across=0.75, keep_within=0.5), trace_source=True)
    images = videos(2, 4).requires_grad_()
    last = model.forward_features(images)
    # 16 patches, 14 after layer 0; 28 in a clip of two, 21 kept across them; 11 after layer 1, 6 after layer 2.
    assert last.shape == (4, 1 + 6, 24)
    sizes, sources = merged_sizes(model), merged_sources(model)
    assert sources.shape == (4, 2 * 17)
    assert (sources[:, [0, 17]] == 0).all(), "class tokens of both frames are the clip's"
    counted = torch.stack([torch.bincount(each, minlength=7) for each in sources])
    assert torch.equal(sizes.squeeze(-1), counted.float())
    model.forward_head(last).square().sum().backward()
    assert (images.grad.flatten(1).abs().amax(1) > 0).all(), "every frame counts"


def test_checkpointing_chooses_the_same_pairs():
    model = patch(tower("vit").train(), 2, clips=ClipMerging(4, {1: 2, 2: 2}))
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(videos(2, 4)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_neighbours_are_of_one_video():
    """The first video's features do not depend on the second."""
    model = patch(tower("vit"), 2, clips=ClipMerging(4, {0: 4}))
    both = videos(2, 4)
    torch.testing.assert_close(model(both)[:1], model(both[:4]), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="6 frames: expected a multiple of 4"):
        model(both[:6])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, {0: 2, 1: 2}), r"6 frames cannot be joined 2 x 2 at a time: .* product, here 4, divides"),
        ((4, {}), "expected {layer from 0"),
        ((4, {1: 2}, 0.4), "keep_across=0.4: expected a share from 0.5 to 1"),
    ],
)
def test_wrong_joins(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipMerging(*arguments)


def test_a_join_beyond_the_last_layer():
    with pytest.raises(ValueError, match="layers are 0 to 2"):
        patch(tower("vit"), 0, clips=ClipMerging(2, {3: 2}))(videos(1, 2))
