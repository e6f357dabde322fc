"""Damaged and malicious shards: the good samples are read, everything else is counted under its reason."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pairtile.engine.data import Reason, ShardDataset, build_loader, iterate_split

OpenSplit = Callable[..., ShardDataset]


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return name, info


@pytest.fixture
def hostile(tmp_path: Path, png: Callable, blank_png: Callable, write_tar: Callable) -> Path:
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    object_array = io.BytesIO()
    np.save(object_array, np.array([Bomb(tmp_path / "exploded")], dtype=object), allow_pickle=True)
    members = [
        ("good0.png", png(0)), ("good0.txt", b"good zero"), ("good0.pickle", bomb), ("good0.pyd", b"MZ"),
        ("broken.png", b"\x89PNG\r\n\x1a\n broken"), ("broken.txt", b"broken"),
        ("cut.png", png(1, (64, 64))[:-600]), ("cut.txt", b"cut"),
        ("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("eps.txt", b"postscript"),
        ("empty.png", png(2)), ("empty.txt", b"  \n"),
        ("silent.png", png(3)),
        ("blind.txt", b"no image"),
        ("huge.png", blank_png(20_000, 20_000)), ("huge.txt", b"a bomb"),
        ("thin.png", blank_png(20_000, 2)), ("thin.txt", b"a thread"),
        ("json.png", png(4)), ("json.json", b"{not json"),
        ("../../x", b"outside"), ("../../x.png", png(5)), ("../../x.txt", b"outside"),
        ("/etc/passwd.txt", b"root"), ("a\\..\\..\\b.png", png(5)),
        link("link.png", "/etc/passwd"), link("hard.png", "good0.png", tarfile.LNKTYPE),
        link("pipe.png", "", tarfile.FIFOTYPE),
        ("array.png", png(6)), ("array.txt", b"array"), ("array.teacher.npy", object_array.getvalue()),
        ("other.mp4", b"film"),
        ("good1.png", png(7)), ("good1.txt", b"good one"),
    ]  # fmt: skip
    write_tar(folder / "train-000000.tar", members)
    return folder


EXPECTED_SKIPPED = {
    "broken": Reason.UNDECODABLE_IMAGE,
    "cut": Reason.UNDECODABLE_IMAGE,
    "eps": Reason.UNDECODABLE_IMAGE,
    "empty": Reason.EMPTY_CAPTION,
    "silent": Reason.MISSING_MEMBER,
    "blind": Reason.MISSING_MEMBER,
    "huge": Reason.IMAGE_TOO_LARGE,
    "thin": Reason.IMAGE_TOO_LARGE,
    "json": Reason.BAD_JSON,
    "array": Reason.BAD_ARRAY,
}


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_and_counts(hostile: Path, open_split: OpenSplit, workers: int, tmp_path: Path) -> None:
    dataset = open_split(hostile)
    assert dataset.counts == {
        Reason.UNSAFE_TYPE: 2,
        Reason.UNSAFE_PATH: 5,
        Reason.NOT_A_FILE: 3,
        Reason.UNKNOWN_TYPE: 1,
    }
    assert (f"{dataset.paths[0]}:../../x", Reason.UNSAFE_PATH) in dataset.examples
    batch = next(build_loader(dataset, batch_size=12, workers=workers))
    assert dict(batch.skipped) == EXPECTED_SKIPPED
    assert sorted(batch.keys) == ["good0", "good1"]
    assert batch.images.shape == (2, 3, 8, 8)
    assert len(batch.input_ids) == len(batch.ids) == len(batch.captions) == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "in", "side", "train-000000.tar", "train-000000.tar.index.npz",
    ]  # fmt: skip


def test_evaluation_counts_alike(hostile: Path, open_split: OpenSplit) -> None:
    batches = list(iterate_split(open_split(hostile, train=False), batch_size=5))
    assert dict(bad for batch in batches for bad in batch.skipped) == EXPECTED_SKIPPED
    assert [key for batch in batches for key in batch.keys] == ["good0", "good1"]


def test_a_batch_of_bad_samples_only_is_empty(tmp_path: Path, open_split: OpenSplit, write_tar: Callable) -> None:
    write_tar(tmp_path / "train-0.tar", [(f"{i}.txt", b"text") for i in range(4)])
    batch = next(build_loader(open_split(tmp_path), batch_size=4))
    assert batch.images.shape == (0, 3, 8, 8)
    assert batch.input_ids.shape == (0, 8)
    assert len(batch) == 0
    assert Counter(reason for _, reason in batch.skipped) == {Reason.MISSING_MEMBER: 4}
    evaluated = next(iterate_split(open_split(tmp_path, train=False), batch_size=4))
    assert len(evaluated) == 0


@pytest.mark.parametrize("keep", [0, 100, 700, 5000, 20_000, 22_000])
def test_truncated_tar(tmp_path: Path, open_split: OpenSplit, png: Callable, write_tar: Callable, keep: int) -> None:
    members = [m for i in range(10) for m in ((f"{i}.png", png(i, (16, 16))), (f"{i}.txt", f"number {i}".encode()))]
    path = write_tar(tmp_path / "train-0.tar", members)
    whole = path.read_bytes()
    assert open_split(tmp_path).counts == {}
    path.write_bytes(whole[:keep])
    dataset = open_split(tmp_path)
    assert dataset.counts == {Reason.TRUNCATED_TAR: 1}
    evaluated = list(iterate_split(dataset, batch_size=64))
    # A sample takes 2560 bytes; its text lies 2048 bytes into it and has 8 bytes.
    assert sum(map(len, evaluated)) == max(0, (keep - 2056) // 2560 + 1)
    assert all(reason == Reason.MISSING_MEMBER for batch in evaluated for _, reason in batch.skipped)


def test_garbage_in_the_middle(tmp_path: Path, open_split: OpenSplit, png: Callable, write_tar: Callable) -> None:
    members = [m for i in range(4) for m in ((f"{i}.png", png(i)), (f"{i}.txt", b"text"))]
    path = write_tar(tmp_path / "train-0.tar", members)
    data = bytearray(path.read_bytes())
    data[2 * 2048 : 2 * 2048 + 512] = b"\xaa" * 512  # the header of the third image
    path.write_bytes(data)
    dataset = open_split(tmp_path)
    assert dataset.counts == {Reason.CORRUPT_TAR: 1}
    assert len(dataset) == 2
    (tmp_path / "train-0.tar").write_bytes(b"not a tar at all " * 100)
    assert open_split(tmp_path).counts == {Reason.CORRUPT_TAR: 1}


def test_a_shard_that_shrinks_while_it_is_read(
    tmp_path: Path, open_split: OpenSplit, png: Callable, write_tar: Callable
) -> None:
    path = write_tar(
        tmp_path / "train-0.tar", [("a.png", png(0)), ("a.txt", b"text"), ("b.png", png(1)), ("b.txt", b"t")]
    )
    dataset = open_split(tmp_path)
    os.truncate(path, 2048)
    batch = next(build_loader(dataset, batch_size=2))
    assert batch.skipped == [("b", Reason.TRUNCATED_TAR)]


def test_of_two_images_the_known_better_one(
    tmp_path: Path, open_split: OpenSplit, png: Callable, write_tar: Callable
) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.webp", b"?"), ("a.png", png(0)), ("a.bmp", b"?"), ("a.txt", b"text")])
    dataset = open_split(tmp_path)
    assert len(next(build_loader(dataset, batch_size=1))) == 1
    assert dataset.counts == {Reason.DUPLICATE_MEMBER: 2}
