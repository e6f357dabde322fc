import re

import pytest
import yaml

from pairtile.engine.errors import PairtileError
from pairtile.engine.presets import PRESETS
from pairtile.engine.recipe import RECIPES, load_recipe, parse_recipe


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train.batchsize": 32}, r"unknown key train\.batchsize; did you mean train\.batch_size\?"),
        ({"learning_rate": 1}, r"unknown key learning_rate"),
        ({"weight_decay": 1}, r"unknown key weight_decay; did you mean train\.weight_decay\?"),
        ({"model.vision.modle": "x"}, r"unknown key model\.vision\.modle; did you mean model\.vision\.model\?"),
        ({"train.lr": "fast"}, r"train\.lr: .*number.*'fast'"),
        ({"train.zero_stage": 4}, r"train\.zero_stage: .*4"),
        ({"train.batch_size": 0}, r"train\.batch_size: .*greater than 0"),
        ({"train.epochs": 3}, r"train: give either steps or epochs"),
        ({"data.image_mode": "RGB"}, r"model\.vision\.channels is 1, but images of data\.image_mode RGB have 3"),
        ({"objectives": []}, r"objectives: at least one objective"),
        ({"model.vision.target": "a:b"}, r"model\.vision: give either model"),
    ],
)
def test_wrong_recipe_is_one_line_that_names_the_key(tiny, changes, expected):
    with pytest.raises(PairtileError) as caught:
        parse_recipe(tiny(**changes))
    assert re.search(expected, one_line(caught))


def test_missing_key(tiny):
    raw = tiny()
    del raw["train"]["batch_size"]
    with pytest.raises(PairtileError, match=r"missing key train\.batch_size"):
        parse_recipe(raw)


def test_overrides_reach_nested_keys_and_lists(write_recipe):
    recipe = load_recipe(
        write_recipe(), ["train.lr=1e-4", "objectives=[{name: siglip}]", "objectives.0.weight=2", "eval.splits=[]"]
    )
    assert (recipe.train.lr, recipe.objectives[0].name, recipe.objectives[0].weight) == (1e-4, "siglip", 2.0)
    assert recipe.eval.splits == []


@pytest.mark.parametrize("override", ["train.lr", "=3", "train.lr.x=1", "objectives.7.weight=1"])
def test_wrong_override(write_recipe, override):
    path = write_recipe(objectives=[{"name": "clip"}])
    with pytest.raises(PairtileError, match="override"):
        load_recipe(path, [override])


def test_missing_file_and_broken_yaml(tmp_path):
    with pytest.raises(PairtileError, match="glyphs_clip"):
        load_recipe("nosuch")
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1, 2")
    with pytest.raises(PairtileError, match="not readable as YAML") as caught:
        load_recipe(broken)
    one_line(caught)
    broken.write_text("- 1")
    with pytest.raises(PairtileError, match="expected a mapping"):
        load_recipe(broken)


def test_preset_is_filled_in_and_overridden(tiny):
    recipe = parse_recipe(
        tiny(model={"preset": "ViT-B-16", "text": {"args": {"num_hidden_layers": 3}}}, **{"data.image_mode": "RGB"})
    )
    assert recipe.model.vision.model == PRESETS["ViT-B-16"]["vision"]["model"]
    assert recipe.model.text.args["num_hidden_layers"] == 3
    assert recipe.model.text.args["hidden_size"] == 512
    with pytest.raises(PairtileError, match="did you mean ViT-B-16"):
        parse_recipe(tiny(model={"preset": "ViT-B16"}))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_name_their_papers(path):
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe.papers
    # what config.yaml holds is a recipe again
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe
