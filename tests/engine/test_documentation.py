"""engine/README.md and engine/data/README.md against the code they describe."""

import re
import shutil
from pathlib import Path

import pytest

from document_blocks import ROOT, run
from pairtile.engine import recipe_keys
from pairtile.engine.recipe import Recipe, load_recipe

README = (ROOT / "engine" / "README.md").read_text()


def test_table_of_recipe_keys_is_current():
    assert recipe_keys.documented(README) == recipe_keys.keys_table(), (
        "engine/README.md has other keys than the recipe: run python -m pairtile.engine.recipe_keys --write"
    )
    with pytest.raises(ValueError, match="no table of recipe keys"):
        recipe_keys.documented("# nothing")


def test_table_names_every_key_that_recipes_use():
    """Keys of each shipped recipe, down to what is a mapping of its own."""
    keys = set(re.findall(r"^\| `([^`]+)` \|", recipe_keys.keys_table(), re.MULTILINE))
    assert {"train.batch_size", "objectives[].name", "model.tokens.dim", "data.captions.tags"} <= keys
    assert {key.split(".")[0].removesuffix("[]") for key in keys} == set(Recipe.model_fields)
    for file in (ROOT / "engine" / "recipes").glob("*.yaml"):
        recipe = load_recipe(file)
        for group in ("train", "eval", "data"):
            for name in getattr(recipe, group).model_fields_set:
                assert any(key == f"{group}.{name}" or key.startswith(f"{group}.{name}.") for key in keys), name


def test_messages_under_troubleshooting_are_what_the_code_says():
    section = README.split("## Troubleshooting")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) > 10
    files = [file for folder in ("engine", "kernels") for file in (ROOT / folder).rglob("*.py")]
    # adjacent literals are one message
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))
    for message in messages:
        for part in re.split(r"\s*\.\.\.[;:?]?\s*", message):
            assert part in source, f"nothing says {part!r}"


def test_data_readme(glyph_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(glyph_shards, tmp_path / "DATA")
    monkeypatch.chdir(tmp_path)

    def in_smaller_batches(dataset, batch_size):
        return build_loader(dataset, batch_size=64)

    from pairtile.engine import data
    from pairtile.engine.data import build_loader

    monkeypatch.setattr(data, "build_loader", in_smaller_batches)
    assert run("engine/data/README.md", {})["batch"].images.shape == (64, 1, 32, 32)
