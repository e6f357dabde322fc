"""Models whose layers merge tokens: small random ones of every family that `patch` knows."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import timm
import token_merging as papers
import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pairtile.kernels.token_merging import (
    KeepRatio,
    Matching,
    TargetTokens,
    is_patched,
    merged_sizes,
    merged_sources,
    patch,
    tokens_per_layer,
    transformer_flops,
    unpatch,
)
from pairtile.kernels.token_merging.patch_timm import rotary_of

TIMM = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_distilled_patch16_224", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "gap": ("vit_base_patch16_siglip_gap_224", {"global_pool": "avgmax"}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov3": ("vit_small_patch16_dinov3", {"global_pool": "avg"}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "vit_post": ("vit_tiny_patch16_224", {"block_fn": ResPostBlock}),
    "eva_post": ("eva02_tiny_patch14_224", {"use_post_norm": True}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),
}


def timm_model(family: str, **options: object) -> nn.Module:
    """Three layers, patches 4 x 4, random weights that are not as small as an untrained model's."""
    name, given = TIMM[family]
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(name, **{**sizes, **given, **options})
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=TIMM)
def model(request):
    return timm_model(request.param)


def rows_alike(batch: int = 2) -> Tensor:
    """Images whose patches, 4 x 4 of them, are equal along each row."""
    return images(batch)[:, :, :, :4].repeat(1, 1, 1, 4)


# ---- what holds for every family ------------------------------------------------------------------------------------


def test_nothing_merged_changes_no_bit_and_unpatch_restores(model):
    before, names, kinds = model(images()), list(model.state_dict()), [type(each) for each in model.modules()]
    patch(model, 0)
    assert torch.equal(model(images()), before)
    assert merged_sizes(model) is None
    unpatch(model)
    assert [type(each) for each in model.modules()] == kinds
    assert not any("merging" in name for each in model.modules() for name in vars(each))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    patch(model, 3)
    assert list(model.state_dict()) == names
    assert not torch.equal(model(images()), before)
    assert torch.equal(unpatch(model)(images()), before)


def test_shapes_sources_and_gradients(model):
    patch(model, [5, 0, 4], trace_source=True)
    first = 16 + model.num_prefix_tokens
    features = model.forward_features(images())
    assert features.shape == (2, first - 9, 24)
    sizes, sources = merged_sizes(model), merged_sources(model)
    assert sources.shape == (2, first)
    counted = torch.stack([torch.bincount(each, minlength=first - 9) for each in sources])
    assert torch.equal(sizes.squeeze(-1), counted.float())
    prefix = torch.arange(model.num_prefix_tokens)
    assert torch.equal(sources[:, : len(prefix)], prefix.expand(2, -1))
    model(images()).square().sum().backward()
    unused = "reg_token" if model.num_prefix_tokens == 0 else "none"
    for name, parameter in model.named_parameters():
        assert name == unused or (parameter.grad is not None and parameter.grad.isfinite().all()), name


def as_the_paper_says(model: nn.Module, image: Tensor, r: list[int]) -> Tensor:
    """ToMe's transformer (arXiv:2210.09461, section 3) written out: its last tokens."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    size = torch.ones(x.shape[:2], dtype=x.dtype)
    for block, each in zip(model.blocks, r, strict=True):
        batch, count, width = x.shape
        q, k, v = block.attn.qkv(block.norm1(x)).view(batch, count, 3, 3, width // 3).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) * (width // 3) ** -0.5 + size.log()[:, None, None, :]
        x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        kept, sources, places = (
            torch.tensor(found) for found in papers.tome(k.detach().mean(1), each, class_token=True)
        )
        assigned = torch.zeros(batch, kept.shape[1], count, dtype=x.dtype).scatter_(2, kept.unsqueeze(-1), 1.0)
        assigned[torch.arange(batch)[:, None], places.long(), sources.long()] = 1
        total = assigned @ size.unsqueeze(-1)
        x, size = assigned @ (size.unsqueeze(-1) * x) / total, total.squeeze(-1)
        x = x + block.mlp(block.norm2(x))
    return model.norm(x)


def test_a_patched_vit_is_the_papers():
    model = timm_model("vit").double()
    right = as_the_paper_says(model, images().double(), [5, 0, 4])
    found = patch(model, [5, 0, 4]).forward_features(images().double())
    # Sizes are float32, exact; what is left is rounding of float64.
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(right)
    parameters = list(model.blocks.parameters())
    for given, expected in zip(
        torch.autograd.grad((found * weight).sum(), parameters),
        torch.autograd.grad((right * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["vit", "vit_post", "deit", "siglip", "gap", "dinov2"])
def test_equal_tokens_merge_without_a_trace(family):
    """Proportional attention and pooling by size: copies of a token count as often merged as they did apart."""
    model = timm_model(family, no_embed_class=True).double() if family == "dinov2" else timm_model(family).double()
    nn.init.zeros_(model.pos_embed)
    whole = model(rows_alike().double())
    patch(model, [4, 3, 0])
    merged = model(rows_alike().double())
    assert merged_sizes(model).shape[1] == 16 + model.num_prefix_tokens - 7
    # Rounding of float64 over three layers.
    torch.testing.assert_close(merged, whole, rtol=1e-9, atol=1e-9)
    unpatch(model)
    assert not torch.allclose(patch(model, [4, 3, 0], proportional=False)(rows_alike().double()), whole, rtol=1e-3)


@pytest.mark.parametrize("method", ["tome", "pitome", "crossget"])
def test_every_method_merges_a_plain_image_without_a_trace(method):
    model = timm_model("vit").double()
    nn.init.zeros_(model.pos_embed)
    image = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    whole = model(image)
    torch.testing.assert_close(patch(model, 4, method=method)(image), whole, rtol=1e-9, atol=1e-9)
    assert merged_sizes(model).shape[1] == 17 - 12


def first_kept(reverse: bool) -> Callable[[Tensor, int, int, int], Matching]:
    """The last r tokens are merged into the last but r; the patches that stay keep their order or have it reversed."""

    def choose(keys: Tensor, r: int, protected: int, layer: int) -> Matching:
        batch, tokens, _ = keys.shape
        order = torch.arange(tokens)
        kept = order[: tokens - r].clone()
        if reverse:
            kept[protected:] = kept[protected:].flip(0)
        place = protected if reverse else tokens - r - 1
        sources = order[tokens - r :].expand(batch, -1)
        return Matching(kept.expand(batch, -1), sources, torch.full_like(sources, place))

    return choose


@pytest.mark.parametrize("family", ["dinov3", "eva", "eva_post", "rope_mixed"])
def test_rotary_positions_follow_the_tokens(family):
    """Attention knows no order but by the rotary embedding: where it follows the tokens, theirs does not matter."""
    model = timm_model(family).double()
    # Of one layer alone, so that both models merge the same tokens.
    r = [4, 0, 0]
    forward = patch(model, r, method=first_kept(False))(images().double())
    reversed_ = patch(unpatch(model), r, method=first_kept(True))(images().double())
    torch.testing.assert_close(forward, reversed_, rtol=1e-9, atol=1e-9)


def test_rotary_embeddings_are_found_in_every_layout():
    shared, per_head = torch.randn(6, 8), torch.randn(3, 6, 8)
    origin = torch.tensor([[0, 1, 4, 2], [0, 1, 7, 5]])
    for sample in range(2):
        patches = origin[sample, 2:] - 2
        assert torch.equal(rotary_of(shared, origin, 2)[sample, 0], shared[patches])
        assert torch.equal(rotary_of(per_head, origin, 2)[sample], per_head[:, patches])
        each = torch.stack([per_head, 2 * per_head])
        assert torch.equal(rotary_of(each, origin, 2)[sample], each[sample][:, patches])


# ---- training, compilation, copies ----------------------------------------------------------------------------------


def gradients(model: nn.Module, *batches: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Of the sum of losses of forward passes that are all made before the backward one."""
    model.zero_grad()
    loss = sum(model(each).square().sum() for each in batches)
    loss.backward()
    return loss.detach(), [each.grad.clone() for each in model.parameters() if each.grad is not None]


@pytest.mark.parametrize("family", ["vit", "dinov3"])
def test_checkpointing_chooses_the_same_pairs(family):
    model = patch(timm_model(family), 4, trace_source=True).train()
    batches = images(seed=1), images(seed=2)
    loss, grads = gradients(model, *batches)
    model.set_grad_checkpointing(True)
    again, grads_again = gradients(model, *batches)
    assert torch.equal(loss, again)
    for one, other in zip(grads, grads_again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused():
    model = patch(timm_model("vit"), 4).train()
    model.set_grad_checkpointing(True)
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            model(images())
    finally:
        timm.layers.set_reentrant_ckpt(False)


def test_compiled_it_is_one_graph():
    model = patch(timm_model("vit"), 4)
    eager, eager_grads = gradients(model, images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.zero_grad()
    loss = compiled(images()).square().sum()
    loss.backward()
    torch.testing.assert_close(loss.detach(), eager)
    for one, parameter in zip(eager_grads, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, one, rtol=1e-4, atol=1e-5)


def test_a_copy_merges_by_itself_and_saves_as_before():
    model = patch(timm_model("vit"), 4, trace_source=True)
    first = model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), first)
    assert twin.merging is twin.blocks[0].merging.model is not model.merging
    unpatch(twin)
    assert is_patched(model)
    assert torch.equal(model(images()), first)
    fresh = timm_model("vit")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images()), twin(images()))


def test_autocast_and_bfloat16():
    model = patch(timm_model("vit"), 4)
    whole = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images())
    assert rounded.dtype == torch.bfloat16
    # Rounding to 8 bits may choose other pairs among near ones, but few: other images are farther off than this.
    assert (rounded.float() - whole).norm() < 0.05 * whole.norm()
    assert (whole[0] - whole[1]).norm() > 0.05 * whole[0].norm()
    assert model.bfloat16()(images().bfloat16()).isfinite().all()


# ---- options --------------------------------------------------------------------------------------------------------


def test_restore_gives_every_token_its_place_back():
    model = timm_model("gap", global_pool="avg").double()
    image = images().double()
    pooled = patch(model, 3)(image)
    unpatch(model)
    patch(model, 3, restore=True)
    assert model.forward_features(image).shape == (2, 16, 24)
    # The mean over restored tokens is the one weighted by size.
    torch.testing.assert_close(model(image), pooled, rtol=1e-9, atol=1e-9)


def test_schedules_and_importance():
    model = patch(timm_model("vit"), TargetTokens(7))
    assert model.forward_features(images()).shape[1] == 7
    unpatch(model)
    layers = []

    def importance(x: Tensor, layer: int) -> Tensor:
        layers.append((layer, x.shape[1]))
        return torch.nn.functional.cosine_similarity(x, x[:, :1], dim=-1)

    patch(model, KeepRatio(0.75), method="crossget", importance=importance)
    assert model(images()).isfinite().all()
    assert layers == [(0, 17), (1, 13), (2, 10)]


def products(model: nn.Module) -> tuple[int, int]:
    """FLOPs of a patched model's linear layers, and of its attention, on one image, as torch counts them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images(1))
    counted = {str(kind): flops for kind, flops in counter.get_flop_counts()["Global"].items()}
    # A linear layer is an addmm, or an mm and a sum where another library has replaced it.
    return counted.get("aten.addmm", 0) + counted.get("aten.mm", 0), counted["aten.bmm"]


def test_flops_are_those_that_torch_counts():
    model = timm_model("vit", num_classes=0)
    assert sum(products(patch(model, 0))) == transformer_flops([17] * 4, 24)
    counts = tokens_per_layer([5, 0, 4], 17, 1)
    linear, _ = products(patch(unpatch(model), [5, 0, 4]))
    assert linear == transformer_flops(counts, 24) - sum(4 * n**2 * 24 for n in counts[:-1])


def test_what_cannot_be_patched_is_told():
    model = timm_model("vit")
    with pytest.raises(ValueError, match="unpatch it first"):
        patch(patch(model, 1), 1)
    with pytest.raises(RuntimeError, match="feature maps"):
        model.forward_intermediates(images())
    with pytest.raises(ValueError, match="trace_source=True"):
        merged_sources(model)
    unpatch(model)
    with pytest.raises(ValueError, match="patch it first"):
        merged_sizes(model)
    with pytest.raises(ValueError, match="expected 'tome'"):
        patch(model, 1, method="random")
    with pytest.raises(ValueError, match='method="crossget"'):
        patch(model, 1, importance=lambda x, layer: x[..., 0])
    with pytest.raises(ValueError, match="at least 1, the model's own"):
        patch(model, 1, protected=0)
    with pytest.raises(TypeError, match="r='8'"):
        patch(model, "8")
    with pytest.raises(TypeError, match="a Sequential: expected a model of timm"):
        patch(nn.Sequential(model), 1)
    with pytest.raises(TypeError, match="a timm ResNet"):
        patch(timm.create_model("resnet18"), 1)
    parallel = timm.create_model(
        "vit_small_patch16_18x2_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3
    )
    with pytest.raises(TypeError, match="a ParallelThingsBlock with"):
        patch(parallel, 1)
    plain = timm_model("vit")
    plain.blocks[1].attn.fused_attn = False
    with pytest.raises(ValueError, match="without timm's fused attention"):
        patch(plain, 1)
    assert not is_patched(model)
    assert type(model) is VisionTransformer
    with pytest.raises(ValueError, match="says nothing of merged tokens"):
        patch(model, 1)(images(), attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_neither_timm_nor_transformers_is_imported():
    found = "import sys, pairtile.kernels.token_merging; print({'timm', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
