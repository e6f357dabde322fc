"""The Python blocks of the documentation, run as they stand: what a reader is assumed to have is made here, small.

CONTRIBUTING.md has its test in tests/kernels/test_contributing.py, engine/data/README.md in tests/engine/test_documentation.py.
"""

import importlib.util
import re

import pytest
import torch
from torch import nn

from document_blocks import ROOT, blocks, run
from pairtile import kernels
from tiny_recipe import TINY


def unit(*shape):
    return nn.functional.normalize(torch.randn(*shape), dim=-1).requires_grad_()


def full_mask(tokens):
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


@pytest.fixture
def tokens():
    """What the sections on late interaction have at hand."""
    torch.manual_seed(0)
    names = {
        "query_tokens": unit(4, 5, 16),
        "page_tokens": unit(4, 9, 16),
        "corpus": unit(20, 9, 16).detach(),
        "image_tokens": unit(4, 9, 16),
        "text_tokens": unit(4, 5, 16),
        "logit_scale": torch.tensor(10.0),
        "group": None,
    }
    for name in ("query", "page", "image", "text"):
        names[f"{name}_mask"] = full_mask(names[f"{name}_tokens"])
    return names


@pytest.fixture
def vision_tower():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", depth=2)


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    """`models/NAME`, untrained, with token embeddings, in the working directory; `a.jpg` beside it."""
    from PIL import Image

    from pairtile.engine.data.tokenizer import train_tokenizer
    from pairtile.engine.export import build_model, write_model_folder
    from pairtile.engine.recipe import parse_recipe

    recipe = parse_recipe(
        TINY | {"model": TINY["model"] | {"tokens": {"dim": 16}}, "data": {"root": ".", **TINY["data"]}}
    )
    folder = tmp_path / "models" / "NAME"
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(["a photo of a cat"], 259, tmp_path)
    weights = build_model(recipe.model, recipe.data, tokenizer).state_dict()
    write_model_folder(folder, weights=weights, model=recipe.model, data=recipe.data, tokenizer=tokenizer)
    Image.new("RGB", (20, 20), "white").save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)


def test_readme(tokens, vision_tower, model_folder):
    found = run("README.md", tokens | {"vision_tower": vision_tower})
    assert found["text_features"].grad is not None
    assert found["scores"].shape == (4, 4)
    assert found["loss"].requires_grad
    assert found["encoder"].encode_text(["a cat"]).shape == (1, TINY["model"]["embed_dim"])


def test_kernels_readme(tokens, vision_tower):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor(2.0))
    names = dict(vars(kernels)) | tokens
    names |= {"image_features": unit(6, 16), "text_features": unit(6, 16), "model": model}
    names |= {"hidden": torch.randn(2, 5, 16), "head": nn.Linear(16, 30), "targets": torch.randint(30, (2, 5))}
    names |= {
        "q": unit(4, 5, 16),
        "d": unit(4, 9, 16),
        "scale": 10.0,
        "bias": -10.0,
        "x": unit(6, 16),
        "y": unit(6, 16),
    }
    names |= {name: full_mask(names[name[0]]) for name in ("q_mask", "d_mask")}
    names |= {"vision_tower": vision_tower, "bert": transformers.BertModel(transformers.BertConfig(**sizes))}
    found = run("kernels/README.md", names, lambda code: "integrations" not in code)
    own = names["x"] @ names["y"].T * 10.0
    others = own.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).logsumexp(1)
    # the last block's loss; float32 sums of a few terms around 10
    torch.testing.assert_close(found["loss"], (others - own.diagonal()).mean(), atol=1e-5, rtol=1e-5)


def test_kernels_readme_on_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    pairtile_st = pytest.importorskip("pairtile.kernels.integrations.sentence_transformers")
    try:
        loss = losses.MultipleNegativesRankingLoss(nn.Identity())
        run("kernels/README.md", {"loss": loss}, lambda code: "integrations import sentence_transformers" in code)
    finally:
        pairtile_st.disable()


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("pylate", "colpali_engine")),
    reason="in the environment of make peers",
)
def test_kernels_readme_on_pylate_and_colpali():
    found = run("kernels/README.md", {}, lambda code: "pairtile_pylate" in code)
    for name in ("pairtile_pylate", "pairtile_colpali"):
        found[name].disable()


def test_large_batches():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.images, self.texts = nn.Linear(8, 4), nn.Linear(6, 4)
            self.logit_scale = nn.Parameter(torch.tensor(10.0))

        def forward(self, images, texts):
            features = {"image_features": self.images(images), "text_features": self.texts(texts)}
            return features | {"logit_scale": self.logit_scale * 1.0}

    model = Model()
    before = model.images.weight.detach().clone()
    names = {"model": model, "loader": [(torch.randn(12, 8), torch.randn(12, 6))], "rank": 0, "world_size": 1}
    run("docs/large_batches.md", names | {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})
    assert not torch.equal(model.images.weight, before)


def test_engine_readme(model_folder):
    from PIL import Image

    found = run("engine/README.md", {"Image": Image})
    assert found["scores"].shape == (1, 1)


def test_every_document_with_python_has_a_test():
    tested = {"README.md", "kernels/README.md", "docs/large_batches.md", "engine/README.md"}
    elsewhere = {"CONTRIBUTING.md", "engine/data/README.md"}
    folders = [ROOT, *(ROOT / name for name in ("kernels", "engine", "docs", "benchmarks"))]
    files = {file for folder in folders for file in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))}
    found = {str(file.relative_to(ROOT)) for file in files if blocks(file.relative_to(ROOT))}
    assert found == tested | elsewhere


def test_no_document_holds_an_unfinished_merge():
    for file in ("README.md", "kernels/README.md", "engine/README.md", "benchmarks/README.md", "CONTRIBUTING.md"):
        assert not re.search(r"^(<<<<<<<|=======|>>>>>>>)", (ROOT / file).read_text(), re.MULTILINE), file
