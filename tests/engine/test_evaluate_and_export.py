"""From a trained run to scores, pictures and a model that others load."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from curves import environment
from pairtile.engine import load
from pairtile.engine.cli import app
from pairtile.engine.data import ShardDataset, build_image_transform, iterate_split
from pairtile.engine.errors import PairtileError
from pairtile.engine.evaluation import evaluate_run
from pairtile.engine.export import export, find_model
from pairtile.engine.prepare import prepare_glyphs
from pairtile.engine.recipe import parse_recipe
from pairtile.engine.train import train
from tiny_recipe import TINY

SCRIPTS = {
    "latin": ["LATIN SMALL LETTER", "LATIN CAPITAL LETTER"],
    "greek": ["GREEK SMALL LETTER", "GREEK CAPITAL LETTER"],
    "cyrillic": ["CYRILLIC SMALL LETTER", "CYRILLIC CAPITAL LETTER"],
    "arrows": ["ARROW", "LEFTWARDS ARROW", "UPWARDS ARROW"],
    "mathematical operators": ["OPERATOR", "SUBSET OF", "EQUAL TO", "LESS-THAN"],
    "box drawing": ["BOX DRAWINGS LIGHT", "BOX DRAWINGS DOUBLE"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned something in half a minute: all characters of five cuts of DejaVu."""
    folder = tmp_path_factory.mktemp("trained")
    fonts = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif"]
    prepare_glyphs(folder / "glyphs", size=16, fonts=fonts, vocab_size=1000, progress=False)
    raw = copy.deepcopy(TINY)
    raw["output"], raw["data"]["root"] = str(folder / "run"), str(folder / "glyphs")
    raw["data"]["val"] = {"font": "font-*.tar"}
    raw["train"] |= {"batch_size": 256, "steps": 160, "warmup_steps": 20, "log_every": 20}
    raw["eval"] |= {
        "contact_sheet": True,
        "without_flags": ["drawing_in_train"],
        "classification": {"label": "script", "classes": SCRIPTS, "templates": ["{}", "{} WITH DOT ABOVE"]},
    }
    return train(parse_recipe(raw))


@pytest.fixture(scope="module")
def images(trained):
    data = load(trained.run_dir).data.model_copy(update={"root": str(trained.run_dir.parent / "glyphs")})
    split = ShardDataset("font-*.tar", config=data, tokenizer=None, transform=build_image_transform(data, 16, False))
    return next(iterate_split(split, batch_size=20)).images


def test_retrieval_and_classification_are_far_above_chance(trained):
    metrics = trained.metrics
    # about 2,900 candidates: chance is 0.03% and 0.3%
    assert metrics["font/text_to_image/R@1"] > 0.01
    assert metrics["font/text_to_image/R@10"] > 0.06
    print({key: value for key, value in metrics.items() if "script" in key or key.endswith("R@10")})
    # six scripts: chance is 1/6 for the mean over classes
    assert metrics["font/script/mean_per_class"] > 0.3
    assert "font/without_drawing_in_train/text_to_image/R@1" in metrics


def test_evaluate_prints_the_table_and_writes_json_markdown_sheet_and_curve(trained, tmp_path):
    done = CliRunner().invoke(app, ["evaluate", str(trained.run_dir), "--which", "last", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Zero-shot retrieval" in done.output
    assert "Zero-shot classification" in done.output
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["splits"]["font"]["classification"]["label"] == "script"
    assert "text" in (tmp_path / "results.md").read_text()
    with Image.open(tmp_path / "font.png") as sheet:
        assert sheet.width > 500
    assert (trained.run_dir / "curve.png").is_file()
    # the model of the last checkpoint is the one that the trainer evaluated at the end
    found = document["splits"]["font"]["subsets"]["font"]["text_to_image"]["recall_at_1"]
    assert found == pytest.approx(trained.metrics["font/text_to_image/R@1"], abs=1e-3)


def test_exported_model_gives_identical_embeddings_in_a_new_process_without_pickle(trained, images, tmp_path):
    folder = export(trained.run_dir, tmp_path / "model", which="last")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    texts = ["GREEK SMALL LETTER ALPHA", "arrow", ""]
    encoder = load(folder)
    here = torch.cat([encoder.encode_image(images), encoder.encode_text(texts)])
    torch.save(images, tmp_path / "images.pt")
    script = f"""
import pickle, torch
from safetensors.torch import save_file
from pairtile.engine import load
import torchvision, timm, transformers  # which define unpicklers of their own
images = torch.load({str(tmp_path / "images.pt")!r})
def refuse(*arguments, **options): raise AssertionError("pickle on the load path")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
torch.set_num_threads({torch.get_num_threads()})
encoder = load({str(folder)!r})
save_file({{"there": torch.cat([encoder.encode_image(images), encoder.encode_text({texts!r})])}}, {str(tmp_path / "there")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "there")["there"], here)
    assert torch.allclose(here.norm(dim=1), torch.ones(len(here)))


def test_pictures_of_any_size_and_mode_are_embedded(trained, images):
    encoder = load(trained.run_dir)
    picture = Image.fromarray(images[0, 0].numpy())
    same = encoder.encode_image(picture)
    assert torch.equal(same, encoder.encode_image(images[:1]))
    assert torch.equal(same, encoder.encode_image([picture.convert("RGBA")]))
    assert encoder.encode_image(picture.resize((50, 70))).shape == same.shape
    assert encoder.encode_text("one").shape == (1, 32)
    with pytest.raises(ValueError, match=r"expected uint8 \[n, 1, 16, 16\]"):
        encoder.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_errors_say_what_is_missing(trained, tmp_path):
    with pytest.raises(PairtileError, match="no model in"):
        load(tmp_path)
    with pytest.raises(PairtileError, match="is not a run folder"):
        evaluate_run(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(PairtileError, match="is not empty"):
        export(trained.run_dir, tmp_path / "full")
    (tmp_path / "damaged").mkdir()
    for file in find_model(trained.run_dir, "last").iterdir():
        if file.is_file():
            (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PairtileError, match=r"config\.json is not readable"):
        load(tmp_path / "damaged")
    broken = export(trained.run_dir, tmp_path / "broken")
    (broken / "config.json").write_text('{"format": "other"}')
    with pytest.raises(PairtileError, match="format 'other'"):
        load(broken)
    with pytest.raises(PairtileError, match="no model in"):
        find_model(tmp_path / "nosuch")
    cut = export(trained.run_dir, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(PairtileError, match=r"does not fit config\.json"):
        load(cut)


def test_loading_calls_nothing_that_a_configuration_names(trained, tmp_path):
    folder = export(trained.run_dir, tmp_path / "model")
    document = json.loads((folder / "config.json").read_text())
    trace = tmp_path / "trace"
    target = {"target": "os:system", "model": None, "args": {"command": f"touch {trace}"}, "out_dim": 8}
    document["model"]["vision"] |= target
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(PairtileError, match="calling os:system; if you trust it, load with allow_targets=True"):
        load(folder)
    assert not trace.exists()


def test_command_line_errors_are_one_line_with_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "pairtile.engine", "evaluate", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")
