"""A small real data set (glyphs of two fonts) and a model that trains on it in seconds."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"image_mode": "L", "context_length": 16, "val": {"unseen": "unseen-*.tar"}},
    "model": {
        "vision": {
            "model": "nf_resnet26",
            # output_stride keeps the last stage above 1 x 1 pixels, where oneDNN's bf16 gradient is not reliable
            "args": {"depths": [1, 1, 1, 1], "channels": [32, 32, 64, 64], "stem_type": "3x3", "stem_chs": 16, "output_stride": 8},
            "image_size": 16,
            "channels": 1,
            "mean": [0.9],
            "std": [0.25],
        },
        "text": {
            "model": "clip_text_model",
            "args": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
        "embed_dim": 32,
    },
    "train": {"batch_size": 32, "steps": 4, "lr": 3e-3, "log_every": 1, "threads": 1},
    "eval": {"match_ids": ["drawing"], "contact_sheet": False},
}


@pytest.fixture(scope="session")
def glyph_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 characters each of four cuts of DejaVu, 16 x 16 pixels."""
    from pairtile.engine.prepare import prepare_glyphs

    folder = tmp_path_factory.mktemp("data") / "glyphs"
    fonts = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif"]
    prepare_glyphs(folder, size=16, fonts=fonts, limit=300, vocab_size=400, workers=1, progress=False)
    return folder


@pytest.fixture
def tiny(glyph_shards: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``tiny(**{"train.steps": 8})``: the raw recipe with changes, writing below ``tmp_path``."""

    def make(**changes: Any) -> dict[str, Any]:
        raw = copy.deepcopy(TINY)
        raw["output"] = str(tmp_path / "run")
        raw["data"]["root"] = str(glyph_shards)
        for key, value in changes.items():
            *parents, last = key.split(".")
            node = raw
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return raw

    return make


@pytest.fixture
def write_recipe(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """The same as a file."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tiny(**changes)))
        return path

    return write
