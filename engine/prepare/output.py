"""The output folder: it appears complete or not at all, and says what it holds."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import socket
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import PairtileError
from .report import PrepareReport

FORMAT = 1
DESCRIPTION = "dataset.json"
DROPPED = "dropped.jsonl"


def explain(error: OSError, out: Path) -> PairtileError:
    """The user's version of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PairtileError(f"no space left while writing {out}; free some or choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PairtileError(f"no permission to write {out}; choose a folder you may write to")
    return PairtileError(f"cannot write {out}: {error.strerror or error}; choose another folder")


def reuse(out: Path, settings: dict[str, Any]) -> PrepareReport | None:
    """The report of the data set in ``out`` if it is complete and made with these settings; None if ``out`` is free.

    Raises:
        PairtileError: ``out`` is something else, which is never overwritten.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise PairtileError(f"{out} is a file; choose a folder that is empty or does not exist")
    if not any(out.iterdir()):
        return None
    try:
        description = json.loads((out / DESCRIPTION).read_bytes())
        same = description["format"] == FORMAT and description["settings"] == json.loads(json.dumps(settings))
        complete = all((out / name).stat().st_size == size for name, size in description["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PairtileError(f"{out} is not empty and holds no data set of pairtile; choose another folder") from None
    if not (same and complete):
        what = "was prepared with other settings" if complete else "is damaged (files are missing or cut short)"
        raise PairtileError(f"the data set in {out} {what}; delete it or choose another folder")
    splits = {name: split["samples"] for name, split in description["splits"].items()}
    dropped_file = out / DROPPED if (out / DROPPED).is_file() else None
    return PrepareReport(out, sum(splits.values()), splits, description["dropped"], dropped_file, reused=True)


def require_free(out: Path) -> None:
    """Raises PairtileError unless ``out`` is missing or an empty folder: nothing is ever overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PairtileError(f"{out} exists and is not empty; delete it or choose another folder")


def _remove_orphans(out: Path) -> None:
    """Delete what runs on this host that were killed have left beside ``out``."""
    prefix = f".{out.name}.partial-{socket.gethostname()}-"
    for left in out.parent.glob(prefix + "*"):
        number = left.name.removeprefix(prefix)
        if number.isdigit() and not Path(f"/proc/{number}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place when the block ends well, and vanishes when it doesn't.

    Raises:
        PairtileError: no permission, no space, or ``out`` has been filled by someone else meanwhile.
    """
    partial = out.parent / f".{out.name}.partial-{socket.gethostname()}-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(out)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if out.is_dir() and any(out.iterdir()):
            raise PairtileError(f"{out} was filled by another run meanwhile; run again to use it")
        os.replace(partial, out)
    except OSError as error:
        raise explain(error, out) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Dropped:
    """Everything that was left out: counted by reason, and listed in ``dropped.jsonl`` as it happens."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / DROPPED
        self.counts: Counter[str] = Counter()
        self._file: io.TextIOWrapper | None = None

    def add(self, source: str, reason: str, detail: str = "") -> None:
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8", errors="backslashreplace")
        self.counts[reason] += 1
        line = {"source": source, "reason": reason, **({"detail": detail} if detail else {})}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class ShardWriter:
    """A tar whose bytes depend on its content alone: no times, owners or extended headers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed in close)

    def add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        self._tar.members = []  # type: ignore[attr-defined]  # or every header stays in memory

    def close(self) -> None:
        self._tar.close()


def write_description(folder: Path, fields: dict[str, Any]) -> None:
    """Write dataset.json, last of all: settings, splits, versions and the size of every file."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != DESCRIPTION}
    text = json.dumps({"format": FORMAT, **fields, "files": files}, indent=1, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
