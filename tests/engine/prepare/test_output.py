"""The output folder appears whole or not at all, and failures are told in one line."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from pairtile.engine.errors import PairtileError
from pairtile.engine.prepare.output import Dropped, ShardWriter, atomic_folder, explain
from pairtile.engine.prepare.pool import ordered_map


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EIO, "cannot write"),
    ],
)
def test_write_errors(number: int, words: str, tmp_path: Path) -> None:
    message = str(explain(OSError(number, os.strerror(number)), tmp_path / "out"))
    assert words in message
    assert str(tmp_path / "out") in message
    assert "\n" not in message


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_folder(tmp_path / "a" / "out") as folder:
            (folder / "x").write_text("x")
            raise KeyError("bug")

    with pytest.raises(KeyError):
        fill()
    assert list((tmp_path / "a").iterdir()) == []


def test_two_runs_at_once(tmp_path: Path) -> None:
    def late() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "mine").write_text("x")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("y")

    with pytest.raises(PairtileError, match="filled by another run"):
        late()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / f".out.partial-{socket.gethostname()}-4194999"  # above the largest process id of Linux
    elsewhere = tmp_path / ".out.partial-another-host-1"
    alive = tmp_path / f".out.partial-{socket.gethostname()}-1"
    for folder in (dead, elsewhere, alive):
        folder.mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([elsewhere.name, alive.name, "out"])


def test_shards_are_the_same_bytes_at_any_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        writer = ShardWriter(tmp_path / name)
        writer.add("x.txt", b"text")
        writer.close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_dropped_takes_any_name(tmp_path: Path) -> None:
    dropped = Dropped(tmp_path)
    dropped.add("caf\udce9.jpg", "bad row")
    dropped.close()
    assert "caf" in dropped.path.read_text(encoding="utf-8")


def kill_self(_: int) -> int:
    os._exit(9)


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(PairtileError, match="worker process was killed"):
        list(ordered_map(kill_self, range(3), workers=2))


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers: int) -> None:
    assert list(ordered_map(abs, range(-40, 0), workers=workers)) == [(i, -i) for i in range(-40, 0)]
