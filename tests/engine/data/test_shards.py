"""Patterns, and where the index of a shard is kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pairtile.engine.data import ShardDataset, expand_shards
from pairtile.engine.data.members import split_name
from pairtile.engine.data.shard_index import load_index
from pairtile.engine.errors import PairtileError

OpenSplit = Callable[..., ShardDataset]


def test_patterns(shards: Path) -> None:
    names = [f"train-{i:06d}.tar" for i in range(3)]
    for pattern in ("train-*.tar", "train-{000000..000002}.tar", names, ["train-000000.tar", "train-*.tar"]):
        assert [path.name for path in expand_shards(pattern, shards)] == names
    assert [path.name for path in expand_shards(str(shards / "train-*[12].tar"))] == names[1:]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("val-*.tar", r"no shards match 'val-\*\.tar' in .*pairtile prepare glyphs --out DIR"),
        ("train-{000000..000009}.tar", r"train-000003\.tar does not exist"),
        ("train-{0.tar", "does not exist|don't pair"),
        ("pipe:touch x", "only local files"),
        ("https://example.org/a.tar", "only local files"),
    ],
)
def test_pattern_errors(shards: Path, pattern: str, message: str) -> None:
    with pytest.raises(PairtileError, match=message) as raised:
        expand_shards(pattern, shards)
    assert "\n" not in str(raised.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(PairtileError, match=r"data\.root: .*nowhere is not a folder.*pairtile prepare"):
        expand_shards("*.tar", tmp_path / "nowhere")


def test_compressed_shards_are_refused(tmp_path: Path, open_split: OpenSplit) -> None:
    (tmp_path / "train-0.tar").write_bytes(b"\x1f\x8b" + b"0" * 100)
    with pytest.raises(PairtileError, match="is compressed"):
        open_split(tmp_path)


def test_split_name_follows_webdataset() -> None:
    assert split_name("a/b.c/d.seg.PNG") == ("a/b.c/d", "seg.png")
    assert split_name("plain") == ("plain", "")
    assert split_name("./x.json") == ("./x", "json")


def test_the_index_is_kept_and_renewed(tmp_path: Path, png: Callable, write_tar: Callable) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.png", png(1)), ("1.txt", b"one")])
    kept = tmp_path / "a.tar.index.npz"
    load_index(path)
    inode = kept.stat().st_ino
    assert len(load_index(path)) == 1
    assert kept.stat().st_ino == inode
    write_tar(path, [("1.png", png(1)), ("1.txt", b"one"), ("2.png", png(2)), ("2.txt", b"two")])
    assert len(load_index(path)) == 2
    kept.write_bytes(b"PK\x03\x04 damaged")
    assert len(load_index(path)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.index.npz"]


def test_a_pickle_in_the_place_of_the_index_is_not_loaded(tmp_path: Path, png: Callable, write_tar: Callable) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.png", png(1)), ("1.txt", b"one")])
    with (tmp_path / "a.tar.index.npz").open("wb") as file:
        np.savez(file, meta=np.array([{"stamp": 1}], dtype=object), allow_pickle=True)
    assert len(load_index(path)) == 1


def test_a_folder_without_write_permission_gets_no_index(
    tmp_path: Path, png: Callable, write_tar: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "read-only"
    folder.mkdir()
    path = write_tar(folder / "a.tar", [("1.png", png(1)), ("1.txt", b"one")])
    folder.chmod(0o555)
    assert len(load_index(path)) == 1
    assert os.listdir(folder) == ["a.tar"]
    assert len(list((tmp_path / "cache" / "pairtile" / "index").iterdir())) == 1
    assert len(load_index(path)) == 1
    (tmp_path / "cache" / "pairtile" / "index").rename(tmp_path / "gone")
    (tmp_path / "cache" / "pairtile" / "index").write_text("in the way")
    assert len(load_index(path)) == 1


def test_many_shards_share_few_open_files(
    tmp_path: Path, open_split: OpenSplit, png: Callable, write_tar: Callable
) -> None:
    for number in range(80):
        write_tar(tmp_path / f"train-{number:03d}.tar", [(f"{number}.png", png(number)), (f"{number}.txt", b"text")])
    dataset = open_split(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert [dataset.sample(i).key for i in range(80)] == [str(i) for i in range(80)]
    assert len(os.listdir("/proc/self/fd")) <= before + 64
    dataset.shards.close()
    assert len(os.listdir("/proc/self/fd")) <= before
