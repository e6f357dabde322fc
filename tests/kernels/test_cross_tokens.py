"""CrossGET's cross tokens in towers: importance, gradients, checkpointing, and their divergence."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from torch import nn

from pairtile.kernels.token_merging import (
    CrossTokens,
    complete_graph_matching,
    cross_token_divergence,
    merged_sizes,
    merged_sources,
    patch,
)
from pairtile.kernels.token_merging.cross_token import cross_guide


def vit(**options: object) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **options).double()


def bert() -> nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
    config = transformers.BertConfig(
        **sizes, vocab_size=50, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertModel(config).double()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def crossed() -> CrossTokens:
    cross = CrossTokens(3, 24).double()
    nn.init.normal_(cross.weight, generator=torch.Generator().manual_seed(2))
    return cross


def test_compiled_it_is_one_graph():
    model = vit()
    patch(model, 4, method="crossget", cross_tokens=crossed())
    expected = model(images())
    found = torch.compile(model, fullgraph=True, backend="eager")(images())
    # the same kernels in the same order
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tower_returns_its_own_tokens_and_the_cross_tokens_learn(checkpointing):
    model, cross = vit().train(), crossed()
    patch(model, 4, method="crossget", cross_tokens=cross, trace_source=True)
    model.set_grad_checkpointing(checkpointing)
    features = model.forward_features(images())
    assert features.shape == (2, 17 - 12, 24)
    assert (merged_sizes(model).sum(1) == 17).all()
    assert merged_sources(model).max() == 4
    tokens = cross.tokens()
    assert tokens.shape == (3, 2, 24)
    # of the last layer none but the class token is needed: its cross token is attended to
    features[:, 0].square().sum().backward()
    assert (cross.weight.grad.abs().amax(1) > 0).all()
    assert torch.equal(copy.deepcopy(cross).weight, cross.weight)


def test_checkpointing_merges_the_same():
    gradients = []
    for checkpointing in (False, True):
        model, cross = vit().train(), crossed()
        patch(model, 4, method="crossget", cross_tokens=cross)
        model.set_grad_checkpointing(checkpointing)
        loss = model(images()).square().sum() + cross.tokens().sin().sum()
        loss.backward()
        gradients.append([cross.weight.grad, *(each.grad for each in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_padding_of_a_text_leaves_no_trace():
    model = patch(bert().eval(), 3, method="crossget", cross_tokens=crossed())
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[1, :7] = ids[0, :7]
    mask = (torch.arange(12) < 7).long().expand(2, -1)
    found = model(ids, attention_mask=mask).last_hidden_state[:, 0]
    # rounding of float64 in 3 layers
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert merged_sizes(model).sum(1).squeeze(-1).tolist() == [7, 7]


def test_importance_is_the_cosine_with_the_cross_token():
    keys = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    importance, barred = cross_guide(keys, 1)
    torch.testing.assert_close(importance[1, 3], torch.cosine_similarity(keys[1, 3], keys[1, 7], dim=0))
    matching = complete_graph_matching(keys, 3, importance, protected=barred)
    assert (matching.kept[:, 0] == 0).all()
    assert (matching.kept[:, -1] == 7).all(), "the cross token stays, and stays last"


def test_divergence():
    """By the definition in float64, and at its two ends: 0, and log 2 for distributions that share nothing."""
    one, other = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = one.softmax(-1), other.softmax(-1)
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    torch.testing.assert_close(cross_token_divergence(one, other), expected)
    far = torch.tensor([1e4, 0.0]), torch.tensor([0.0, 1e4])
    assert cross_token_divergence(*far).item() == pytest.approx(0.6931472, rel=1e-6)
    assert cross_token_divergence(one, one).abs().max() < 1e-15
    assert torch.autograd.gradcheck(cross_token_divergence, (one.requires_grad_(), other.requires_grad_()))


@pytest.mark.parametrize(
    ("options", "cross", "message"),
    [
        ({"method": "tome"}, CrossTokens(3, 24), 'go with method="crossget"'),
        ({"method": "crossget"}, CrossTokens(2, 24), "cross_tokens of 2 layers: the model has 3"),
    ],
)
def test_what_does_not_fit(options, cross, message):
    with pytest.raises(ValueError, match=message):
        patch(vit(), 1, cross_tokens=cross, **options)


def test_a_class_token_is_needed():
    with pytest.raises(ValueError, match="no class token to start from"):
        patch(vit(class_token=False, global_pool="avg"), 1, method="crossget", cross_tokens=CrossTokens(3, 24))
