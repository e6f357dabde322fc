"""A person's own images and captions: folder, CSV, JSONL and foreign shards, 20 images each."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pairtile.engine.data import Caption, Sample, load_tokenizer
from pairtile.engine.errors import PairtileError
from pairtile.engine.prepare import WriteOptions, prepare_csv, prepare_folder, prepare_jsonl, prepare_webdataset

Read = Callable[[Path, str], list[Sample]]


@pytest.fixture
def images(tmp_path: Path, picture: Callable) -> Path:
    """A folder with twenty JPEGs."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}.jpg").write_bytes(picture(number))
    return folder


def both(out: Path, read_back: Read) -> list[Sample]:
    """The samples of train and val, by their source."""
    train, val = read_back(out, "train"), read_back(out, "val")
    assert train
    assert val
    return sorted(train + val, key=lambda sample: sample.labels["source"])


def test_folder_with_sidecars(images: Path, tmp_path: Path, options: WriteOptions, read_back: Read) -> None:
    for number in range(10):
        (images / f"{number:02d}.txt").write_text(f"picture {number}\n\nimage {number}\n")
    for number in range(10, 20):
        (images / f"{number:02d}.json").write_text(
            json.dumps({"captions": {"en": f"picture {number}"}, "id": number * 7})
        )
    report = prepare_folder(images, tmp_path / "out", options=options, progress=False)
    assert (report.written, report.dropped, report.dropped_file) == (20, {}, None)
    samples = both(report.out, read_back)
    assert samples[3].captions == [Caption("picture 3"), Caption("image 3")]
    assert samples[12].captions == [Caption("picture 12", "en")]
    assert samples[12].id == 84
    assert [sample.image for sample in samples] == [path.read_bytes() for path in sorted(images.glob("*.jpg"))]
    assert load_tokenizer(report.out).vocab_size <= 300
    assert json.loads((report.out / "dataset.json").read_text())["splits"]["train"]["samples"] == report.splits["train"]


def test_folder_names_as_captions(tmp_path: Path, picture: Callable, read_back: Read) -> None:
    for number in range(20):
        path = tmp_path / "animals" / ("red_fox" if number % 2 else "cat") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, format="PNG"))
    options = WriteOptions(val_fraction=0, vocab_size=300, workers=1)
    report = prepare_folder(tmp_path / "animals", tmp_path / "out", captions="folder", options=options, progress=False)
    samples = read_back(report.out, "train")
    assert {(sample.captions[0].text, sample.labels["folder"]) for sample in samples} == {
        ("red fox", "red_fox"),
        ("cat", "cat"),
    }
    assert len({sample.id for sample in samples}) == 2
    assert report.splits == {"train": 20, "val": 0}
    assert not list(report.out.glob("val-*"))


def write_csv(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_csv(images: Path, tmp_path: Path, options: WriteOptions, read_back: Read, suffix: str) -> None:
    rows = [
        {"file": f"{n:02d}.jpg", "en": f"picture, {n}", "de": f'"Bild" {n}\nzwei' if n else "", "product": f"P{n // 2}", "shop": "x"}
        for n in range(20)
    ]  # fmt: skip
    table = write_csv(tmp_path / f"table.{suffix}", rows, "," if suffix == "csv" else "\t")
    report = prepare_csv(
        table, tmp_path / "out", image="file", captions=["en", "de"], id="product", labels=["shop"], root=images,
        options=options, progress=False,
    )  # fmt: skip
    samples = both(report.out, read_back)
    assert len(samples) == 20
    assert samples[0].captions == [Caption("picture, 0", "en")]
    assert samples[5].captions == [Caption("picture, 5", "en"), Caption('"Bild" 5\nzwei', "de")]
    assert samples[4].id == samples[5].id != samples[6].id
    assert samples[4].labels == {"shop": "x", "source": "04.jpg"}
    train_ids = {sample.id for sample in read_back(report.out, "train")}
    assert not train_ids & {sample.id for sample in read_back(report.out, "val")}


def test_jsonl(images: Path, tmp_path: Path, options: WriteOptions, read_back: Read) -> None:
    lines = [
        {"image": f"images/{n:02d}.jpg", "captions": [{"text": f"c {n}", "tag": "alt"}], "clip": n / 10}
        for n in range(20)
    ]
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    report = prepare_jsonl(table, tmp_path / "out", options=options, progress=False)
    samples = both(report.out, read_back)
    assert len(samples) == 20
    assert samples[7].captions == [Caption("c 7", "alt")]
    assert samples[7].scores == {"clip": 0.7}


def test_jsonl_with_own_keys(images: Path, tmp_path: Path, options: WriteOptions, read_back: Read) -> None:
    lines = [
        {"path": f"{n:02d}.jpg", "title": f"t {n}", "alts": [f"a {n}", f"b {n}"], "sku": f"S{n}"} for n in range(20)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = prepare_jsonl(
        tmp_path / "t.jsonl", tmp_path / "out", image="path", captions={"title": "t", "alts": "a"}, id="sku",
        root=images, options=options, progress=False,
    )  # fmt: skip
    samples = both(report.out, read_back)
    assert samples[3].captions == [Caption("t 3", "t"), Caption("a 3", "a"), Caption("b 3", "a")]
    assert samples[3].id != samples[4].id


def test_webdataset(tmp_path: Path, picture: Callable, options: WriteOptions, read_back: Read) -> None:
    array = io.BytesIO()
    np.save(array, np.arange(3, dtype=np.float32))
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(shard * 10, shard * 10 + 10):
                fields = {
                    "captions": {"en": f"w {number}"},
                    "id": number,
                    "flags": {"ok": True},
                    "boxes": [[0, 0, 1, 1]],
                }
                for name, data in (
                    ("jpg", picture(number)), ("json", json.dumps(fields).encode()), ("vit.npy", array.getvalue()),
                ):  # fmt: skip
                    info = tarfile.TarInfo(f"k{number:02d}.{name}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    report = prepare_webdataset(tmp_path, tmp_path / "out", options=options, progress=False)
    samples = both(report.out, read_back)
    assert [sample.id for sample in samples] == list(range(20))
    assert samples[11].flags == {"ok": True}
    assert samples[11].boxes == [[0.0, 0.0, 1.0, 1.0]]
    assert samples[11].arrays["vit"].tolist() == [0, 1, 2]
    assert samples[11].labels["source"] == "1.tar:k11"


def test_workers_change_nothing(images: Path, tmp_path: Path) -> None:
    for number in range(20):
        (images / f"{number:02d}.txt").write_text(f"picture {number}")
    shards = []
    for workers in (1, 2):
        options = WriteOptions(size=6, workers=workers, vocab_size=0, samples_per_shard=7, val_fraction=0.3)
        report = prepare_folder(images, tmp_path / f"out{workers}", options=options, progress=False)
        assert not (report.out / "tokenizer.json").exists()
        shards.append({path.name: path.read_bytes() for path in report.out.glob("*.tar")})
    assert len(shards[0]) >= 3
    assert shards[0] == shards[1]


@pytest.mark.parametrize("target", ["keep", "jpeg", "png", "webp"])
def test_resizing_and_formats(tmp_path: Path, picture: Callable, read_back: Read, target: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name, size, kind in (("a.jpg", (40, 20), "JPEG"), ("b.png", (10, 5), "PNG"), ("c.bmp", (10, 30), "BMP")):
        (source / name).write_bytes(picture(1, size, kind))
        (source / name).with_suffix(".txt").write_text("text")
    Image.new("I;16", (30, 30), 257 * 9).save(source / "d.png")
    (source / "d.txt").write_text("text")
    options = WriteOptions(size=16, format=target, val_fraction=0, vocab_size=0, workers=1)  # type: ignore[arg-type]
    report = prepare_folder(source, tmp_path / "out", options=options, progress=False)
    images = [Image.open(io.BytesIO(sample.image)) for sample in read_back(report.out, "train")]
    assert [image.size for image in images] == [(16, 8), (10, 5), (5, 16), (16, 16)]
    expected = {"keep": ["JPEG", "PNG", "PNG", "PNG"]}.get(target, [target.upper()] * 4)
    assert [image.format for image in images] == expected
    assert abs(int(np.asarray(images[3]).mean()) - 9) <= 1
    kept = read_back(report.out, "train")[1].image == (source / "b.png").read_bytes()
    assert kept == (target in ("keep", "png"))


def test_errors(images: Path, tmp_path: Path, options: WriteOptions) -> None:
    table = write_csv(tmp_path / "t.csv", [{"image": "00.jpg", "caption": "x"}])
    out = tmp_path / "out"
    with pytest.raises(PairtileError, match=r"no column 'captoin'.*did you mean 'caption'"):
        prepare_csv(table, out, captions="captoin", options=options)
    with pytest.raises(PairtileError, match="is not a file"):
        prepare_jsonl(tmp_path / "no.jsonl", out, options=options)
    with pytest.raises(PairtileError, match="is not a folder"):
        prepare_folder(tmp_path / "nothing", out, options=options)
    with pytest.raises(PairtileError, match="image root"):
        prepare_csv(table, out, root=tmp_path / "nothing", options=options)
    with pytest.raises(PairtileError, match="no shards match"):
        prepare_webdataset(images, out, options=options)
    with pytest.raises(PairtileError, match=r"no sample is left for training.*20 missing member"):
        prepare_folder(images, out, options=options, progress=False)
    assert not out.exists()
    with pytest.raises(PairtileError, match="exists and is not empty"):
        prepare_folder(images, images, options=options)
    with pytest.raises(PairtileError, match=r"cannot write|no permission"):
        prepare_folder(images, table / "out", options=options)
    for wrong in (
        {"size": 0},
        {"format": "gif"},
        {"quality": 101},
        {"val_fraction": 1},
        {"vocab_size": 5},
        {"workers": 0},
    ):
        with pytest.raises(PairtileError, match=next(iter(wrong))):
            WriteOptions(**wrong)  # type: ignore[arg-type]
