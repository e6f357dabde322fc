"""A small real data set (glyphs of two fonts) and a model that trains on it in seconds."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_recipe import TINY

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
