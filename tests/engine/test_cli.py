"""The ``pairtile`` command: that every option reaches the function it is meant for."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from pairtile.engine.cli import app
from pairtile.engine.data import load_tokenizer
from pairtile.engine.errors import PairtileError
from pairtile.engine.prepare import prepare_tokenizer


def invoke(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def pictures(tmp_path):
    """Twenty pictures with captions in the three forms that people have them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in range(20):
        Image.new("RGB", (40, 30), (number * 12, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")
        rows.append({"image": f"{number}.png", "title": f"picture {number}", "titel": f"Bild {number}", "id": number})
    header = "image,title,titel,id\n"
    (folder / "table.csv").write_text(header + "".join(",".join(map(str, row.values())) + "\n" for row in rows))
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


COMMON = ("--size", 16, "--format", "png", "--val-fraction", 0.2, "--vocab-size", 300, "--workers", 1)


@pytest.mark.parametrize(
    ("kind", "source", "options", "tags"),
    [
        ("folder", "", (), {""}),
        ("csv", "table.csv", ("--caption", "title", "--caption", "titel=de", "--id", "id"), {"title", "de"}),
        ("jsonl", "table.jsonl", ("--caption", "title"), {""}),
    ],
)
def test_prepare(pictures, tmp_path, kind, source, options, tags):
    out = tmp_path / "shards"
    printed = invoke("prepare", kind, pictures / source, "--out", out, *COMMON, *options)
    assert "wrote 20 samples" in printed
    assert (out / "tokenizer.json").is_file()
    from pairtile.engine.data import DataConfig, ShardDataset, build_image_transform

    config = DataConfig(root=str(out))
    found = []
    for split in ("train-*.tar", "val-*.tar"):
        data = ShardDataset(split, config=config, tokenizer=None, transform=build_image_transform(config, 16, False))
        found += [data.sample(index) for index in range(len(data))]
    assert len(found) == 20
    assert {caption.tag for sample in found for caption in sample.captions} == tags
    again = tmp_path / "again"
    assert "wrote 20 samples" in invoke("prepare", "webdataset", out, "--out", again, *COMMON)


def test_prepare_tokenizer(glyph_shards, tmp_path):
    printed = invoke("prepare", "tokenizer", glyph_shards, "--out", tmp_path / "tokenizer", "--vocab-size", 290)
    assert "290 tokens" in printed
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    ids, mask = tokenizer.encode(["LATIN SMALL LETTER A"], 16)
    assert 3 < int(mask.sum()) <= 16
    assert ids.max() < 290
    with pytest.raises(PairtileError, match="tag among fr"):
        prepare_tokenizer(glyph_shards, tmp_path / "other", tags=["fr"])


def test_info_and_dry_run(write_recipe):
    assert "backends" in invoke("info")
    assert "zero_stage: 2" in invoke("train", write_recipe(), "train.zero_stage=2", "--dry-run")
