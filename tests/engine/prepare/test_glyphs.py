"""The glyphs data set: deterministic, held out as promised, reused, and in the common schema."""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from pairtile.engine.data import (
    DataConfig,
    EvalBatch,
    ShardDataset,
    build_image_transform,
    iterate_split,
    load_tokenizer,
)
from pairtile.engine.errors import PairtileError
from pairtile.engine.prepare import prepare_glyphs
from pairtile.engine.prepare.fonts import draw_font, named_characters
from pairtile.engine.prepare.glyphs import FONTS
from pairtile.engine.prepare.scripts import script_of

FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SMALL = {
    "fonts": ["DejaVuSans", "DejaVuSans-Bold", "STIXGeneral", "DejaVuSerif", "DejaVuSerif-Bold"],
    "limit": 250, "samples_per_shard": 300, "vocab_size": 400, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "glyphs"
    prepare_glyphs(out, workers=1, **SMALL)
    return out


def read(folder: Path, split: str) -> EvalBatch:
    config = DataConfig.model_validate({"root": str(folder), "image_mode": "L"})
    dataset = ShardDataset(
        f"{split}-*.tar", config=config, tokenizer=None, transform=build_image_transform(config, 32, False)
    )
    assert dataset.counts == {}
    (batch,) = iterate_split(dataset, batch_size=10_000)
    assert batch.skipped == []
    return batch


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.iterdir()) if not path.name.endswith(".npz")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes(glyphs: Path, tmp_path: Path) -> None:
    prepare_glyphs(tmp_path / "again", workers=2, **SMALL)
    one, two = digests(glyphs), digests(tmp_path / "again")
    one.pop("dataset.json"), two.pop("dataset.json")  # holds the sizes of the indexes, which hold times
    assert one == two
    prepare_glyphs(tmp_path / "other", seed=1, workers=1, **SMALL)
    other = digests(tmp_path / "other")
    assert other["train-000000.tar"] != one["train-000000.tar"]


def test_splits(glyphs: Path) -> None:
    splits = {name: read(glyphs, name) for name in ("train", "font", "unseen", "font_all", "unseen_all")}
    codes = {name: batch.ids.tolist() for name, batch in splits.items()}
    seen = set(codes["train"])
    everything = set().union(*map(set, codes.values()))
    assert "DejaVu Serif" not in splits["train"].labels["font"]
    assert set(zip(splits["font"].labels["font"], splits["font"].labels["cut"])) == {("DejaVu Serif", "Regular")}
    assert set(codes["font"]) <= seen
    assert len(codes["font"]) == len(set(codes["font"]))
    assert not seen & set(codes["unseen"])
    assert set(codes["unseen"]) == everything - seen
    assert len(codes["unseen"]) == len(set(codes["unseen"]))
    assert set(splits["font_all"].labels["font"]) == {"DejaVu Serif"}
    assert not seen & set(codes["unseen_all"])
    assert 0.08 < len(codes["unseen"]) / len(everything) < 0.14
    assert codes["font"] == sorted(codes["font"])
    assert codes["train"] != sorted(codes["train"])
    drawn = sum(len(draw_font(FONT_FOLDER / f"{name}.ttf", 32, 250).code_points) for name in SMALL["fonts"])
    assert sum(map(len, codes.values())) == drawn


def test_samples(glyphs: Path) -> None:
    train, font = read(glyphs, "train"), read(glyphs, "font")
    assert train.images.shape[1:] == (1, 32, 32)
    for row in range(0, len(train), 37):
        code = int(train.ids[row])
        assert train.labels["character"][row] == chr(code)
        assert [caption.text for caption in train.captions[row]] == [unicodedata.name(chr(code))]
    assert train.flags["drawing_in_train"].all()

    drawings: dict[int, bytes] = {}
    for batch in (train, font):
        for number, image in zip(batch.ids_extra["drawing"].tolist(), batch.images):
            assert drawings.setdefault(number, image.numpy().tobytes()) == image.numpy().tobytes()
    assert len(set(drawings.values())) == len(drawings)
    trained = {image.numpy().tobytes() for image in train.images}
    assert font.flags["drawing_in_train"].tolist() == [image.numpy().tobytes() in trained for image in font.images]


def test_description_and_tokenizer(glyphs: Path) -> None:
    description = json.loads((glyphs / "dataset.json").read_text())
    assert description["image"] == {"size": 32, "mode": "L"}
    assert description["splits"]["train"]["samples"] == len(read(glyphs, "train"))
    assert description["dropped"]["blank glyph"] > 0
    assert {"pillow", "freetype", "matplotlib", "unicode"} <= set(description["versions"])
    assert load_tokenizer(glyphs).vocab_size <= 400


def test_reuse_and_refusal(glyphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "glyphs"
    shutil.copytree(glyphs, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    report = prepare_glyphs(out, **SMALL)
    assert report.reused
    assert report.splits["train"] == len(read(glyphs, "train"))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(PairtileError, match="prepared with other settings"):
        prepare_glyphs(out, seed=1, **SMALL)
    with (out / "train-000000.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(PairtileError, match="is damaged"):
        prepare_glyphs(out, **SMALL)
    (out / "dataset.json").unlink()
    with pytest.raises(PairtileError, match="holds no data set"):
        prepare_glyphs(out, **SMALL)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pairtile.engine.prepare.glyphs.train_tokenizer", fail)
    with pytest.raises(PairtileError, match="no space left"):
        prepare_glyphs(tmp_path / "glyphs", workers=1, **{**SMALL, "limit": 20})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"fonts": ["Comic"]}, "unknown font 'Comic'"), ({"size": 2}, "at least 8"), ({"workers": 0}, "at least 1")],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(PairtileError, match=message):
        prepare_glyphs(tmp_path / "glyphs", **{**SMALL, "limit": 5, **arguments})


@pytest.mark.parametrize("name", ["DejaVuSans", "STIXGeneralItalic"])
def test_drawing(name: str) -> None:
    font = draw_font(FONT_FOLDER / f"{name}.ttf", 32, 95)
    image = dict(zip(font.code_points.tolist(), font.images))
    assert all(pixels.min() < 128 for pixels in image.values())
    assert 32 not in image
    assert (32, "blank glyph") in font.left_out
    for one, other in (".,", "oO", "',", "-_", "sS", "|l"):
        assert not np.array_equal(image[ord(one)], image[ord(other)])
    ink = {char: 255 - image[ord(char)].astype(int) for char in "oO.'"}
    assert ink["O"].sum() > 1.2 * ink["o"].sum()
    rows = np.arange(32)[:, None]
    height = {char: (pixels * rows).sum() / pixels.sum() for char, pixels in ink.items()}
    assert height["'"] < 12 < 20 < height["."]


def test_every_glyph_fits_and_small_sizes_work() -> None:
    wide = draw_font(FONT_FOLDER / "DejaVuSans.ttf", 9, 60)
    assert wide.images.shape[1:] == (9, 9)
    assert all(pixels.min() < 255 for pixels in wide.images)


def test_all_fonts_are_there_and_none_is_drawn_outside_the_basic_plane() -> None:
    for name in FONTS:
        codes = named_characters(FONT_FOLDER / f"{name}.ttf")
        assert len(codes) > 800
        assert max(codes) <= 0xFFFF


@pytest.mark.parametrize(
    ("character", "script"),
    [
        ("a", "latin"), ("я", "cyrillic"), ("ά", "greek"), ("ش", "arabic"), ("→", "arrows"), ("∑", "mathematical operators"),
        ("⠿", "braille"), ("7", "digit"), ("€", "currency"), (",", "punctuation"), ("═", "box drawing"), ("☂", "pictograph"),
        ("\u0301", "combining mark"), ("■", "geometric shape"),
    ],
)  # fmt: skip
def test_scripts(character: str, script: str) -> None:
    assert script_of(ord(character), unicodedata.name(character)) == script


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_glyphs(tmp_path / "g", **{**SMALL, "limit": 5, "fonts": ["DejaVuSans"], "progress": True, "workers": 1})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "writing shards" in captured.err
