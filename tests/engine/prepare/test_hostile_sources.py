"""Sources with traps: what is usable is written, the rest is counted and listed, nothing runs or escapes."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pairtile.engine.data import Reason, Sample
from pairtile.engine.prepare import WriteOptions, prepare_csv, prepare_folder, prepare_jsonl, prepare_webdataset

Read = Callable[[Path, str], list[Sample]]
OPTIONS = WriteOptions(val_fraction=0, vocab_size=300, workers=2)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path: Path, picture: Callable, bomb_png: bytes) -> Path:
    """in/: two good images and one of each kind of bad one; secret.png and the bomb's target lie beside it."""
    folder = tmp_path / "in"
    folder.mkdir()
    files = {
        "good0.jpg": picture(0), "good0.txt": b"good", "good1.png": picture(1, format="PNG"), "good1.txt": b"good",
        "broken.jpg": b"\xff\xd8\xff\xe0 broken", "broken.txt": b"text",
        "cut.jpg": picture(2, (64, 64))[:700], "cut.txt": b"text",
        "empty.jpg": picture(3), "empty.txt": b" \n\n",
        "silent.jpg": picture(4),
        "blind.txt": b"text",
        "bomb.png": bomb_png, "bomb.txt": b"text",
        "latin1.jpg": picture(5), "latin1.txt": b"caf\xe9",
        "json.jpg": picture(6), "json.json": b"{",
        "code.pyd": b"MZ", "code.pickle": pickle.dumps(Bomb(tmp_path / "exploded")),
        "notes.md": b"# notes",
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (tmp_path / "secret.png").write_bytes(picture(9, format="PNG"))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "link.txt").write_bytes(b"text")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "pipe.txt").write_bytes(b"text")
    return folder


def test_folder(trap: Path, tmp_path: Path, read_back: Read, dropped: Callable) -> None:
    report = prepare_folder(trap, tmp_path / "out", options=OPTIONS, progress=False)
    assert dropped(report.out) == {
        "broken.jpg": Reason.UNDECODABLE_IMAGE, "cut.jpg": Reason.UNDECODABLE_IMAGE, "empty.jpg": Reason.EMPTY_CAPTION,
        "silent.jpg": Reason.MISSING_MEMBER, "blind": Reason.MISSING_MEMBER, "bomb.png": Reason.IMAGE_TOO_LARGE,
        "latin1.jpg": Reason.BAD_TEXT, "json.jpg": Reason.BAD_JSON, "code.pyd": Reason.UNSAFE_TYPE,
        "code.pickle": Reason.UNSAFE_TYPE, "notes.md": Reason.UNKNOWN_TYPE, "link.png": Reason.UNSAFE_PATH,
        "pipe.jpg": Reason.NOT_A_FILE,
    }  # fmt: skip
    assert sum(report.dropped.values()) == 13
    assert report.dropped_file == report.out / "dropped.jsonl"
    assert [sample.labels["source"] for sample in read_back(report.out, "train")] == ["good0.jpg", "good1.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "secret.png"]


def test_links_out_are_followed_when_allowed(trap: Path, tmp_path: Path, read_back: Read) -> None:
    report = prepare_folder(trap, tmp_path / "out", allow_outside=True, options=OPTIONS, progress=False)
    assert "link.png" in [sample.labels["source"] for sample in read_back(report.out, "train")]


PATHS = {
    "good0.jpg": None,
    "../secret.png": Reason.UNSAFE_PATH,
    "/etc/passwd": Reason.UNSAFE_PATH,
    "link.png": Reason.UNSAFE_PATH,
    "a\\..\\b.png": Reason.UNSAFE_PATH,
    "code.pickle": Reason.UNSAFE_TYPE,
    "nowhere.png": Reason.MISSING_MEMBER,
    ".": Reason.NOT_A_FILE,
    "": Reason.MISSING_MEMBER,
    "bomb.png": Reason.IMAGE_TOO_LARGE,
    "pipe.jpg": Reason.NOT_A_FILE,
}


def test_csv(trap: Path, tmp_path: Path, dropped: Callable) -> None:
    table = tmp_path / "t.csv"
    lines = ["image,caption", *(f"{path},text" for path in PATHS), "good1.png,", "good1.png", "good1.png,caf\udce9"]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    report = prepare_csv(table, tmp_path / "out", root=trap, options=OPTIONS, progress=False)
    expected = {f"t.csv:{number}": reason for number, reason in enumerate(PATHS.values(), 2) if reason}
    last = len(PATHS) + 1
    expected[f"t.csv:{last + 1}"] = expected[f"t.csv:{last + 2}"] = Reason.EMPTY_CAPTION
    expected[f"t.csv:{last + 3}"] = Reason.BAD_TEXT
    assert dropped(report.out) == expected
    assert report.written == 1


def test_jsonl(trap: Path, tmp_path: Path, dropped: Callable) -> None:
    table = tmp_path / "t.jsonl"
    rows = [json.dumps({"image": path, "caption": "text"}) for path in PATHS]
    table.write_text("\n".join([*rows, "{", "[1]", json.dumps({"image": 3}), json.dumps({"image": "good1.png"})]))
    report = prepare_jsonl(table, tmp_path / "out", root=trap, options=OPTIONS, progress=False)
    expected = {f"t.jsonl:{number}": reason for number, reason in enumerate(PATHS.values(), 1) if reason}
    reasons = [Reason.BAD_JSON, Reason.BAD_JSON, Reason.MISSING_MEMBER, Reason.MISSING_MEMBER]
    expected |= {f"t.jsonl:{number}": reason for number, reason in enumerate(reasons, len(PATHS) + 1)}
    assert dropped(report.out) == expected
    assert report.written == 1


def test_webdataset(trap: Path, tmp_path: Path, read_back: Read, dropped: Callable) -> None:
    shard = tmp_path / "hostile.tar"
    with tarfile.open(shard, "w") as archive:
        for name in sorted(path.name for path in trap.iterdir() if path.is_file() and not path.is_symlink()):
            archive.add(trap / name, name)
        info = tarfile.TarInfo("../../x")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data.rstrip(b"\0"))])  # no end of archive: cut short
    report = prepare_webdataset(shard, tmp_path / "out" / "deep", options=OPTIONS, progress=False)
    assert report.dropped == {
        Reason.UNDECODABLE_IMAGE: 2, Reason.EMPTY_CAPTION: 1, Reason.MISSING_MEMBER: 4, Reason.IMAGE_TOO_LARGE: 1,
        Reason.BAD_TEXT: 1, Reason.BAD_JSON: 1, Reason.UNSAFE_TYPE: 2, Reason.UNKNOWN_TYPE: 1, Reason.UNSAFE_PATH: 1,
        Reason.TRUNCATED_TAR: 1,
    }  # fmt: skip
    assert dropped(report.out)["hostile.tar:bomb"] == Reason.IMAGE_TOO_LARGE
    assert len(read_back(report.out, "train")) == 2
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "x").exists()
