"""Where every member of a tar shard lies, so that samples are read at random without extracting anything.

The index of ``x.tar`` is ``x.tar.index.npz`` beside it, else in the user's cache folder, else only in memory.
It holds numpy arrays (never pickles) and the size and modification time of the shard it describes; anything
that does not fit is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PairtileError
from .members import IMAGE_EXTENSIONS, refusal, split_name
from .schema import Reason

INDEX_VERSION = 1
# Columns of `ShardIndex.members`: offset and size of each member; size -1 means that there is none.
IMAGE, RECORD, TEXT = 0, 2, 4
_MAX_EXAMPLES = 1000


@dataclass
class ShardIndex:
    """n samples of one shard.

    Attributes:
        keys: uint8, the UTF-8 keys end to end. key_ends: int64 [n], where each key ends.
        members: int64 [n, 6], (offset, size) of the image, the ``.json`` and the ``.txt``.
        arrays: int64 [m, 3], (sample, offset, size) of each ``.npy`` member. array_names: their names [m].
        counts: what was left out, by reason. examples: the first (member, reason) of them.
    """

    keys: NDArray[np.uint8]
    key_ends: NDArray[np.int64]
    members: NDArray[np.int64]
    arrays: NDArray[np.int64]
    array_names: list[str]
    counts: dict[str, int]
    examples: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.key_ends)


class _Builder:
    """Groups members, in the order of the tar, into samples: neighbours with one key belong together."""

    def __init__(self) -> None:
        self.keys = bytearray()
        self.key_ends: list[int] = []
        self.members: list[list[int]] = []
        self.arrays: list[tuple[int, int, int]] = []
        self.array_names: list[str] = []
        self.counts: Counter[str] = Counter()
        self.examples: list[tuple[str, str]] = []
        self._key: str | None = None
        self._image_rank = 0

    def refuse(self, name: str, reason: str) -> None:
        self.counts[reason] += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append((name, reason))

    def add(self, name: str, offset: int, size: int) -> None:
        key, extension = split_name(name)
        reason = refusal(name, extension)
        if reason is not None:
            return self.refuse(name, reason)
        if key != self._key:
            self._key = key
            self.keys += key.encode("utf-8", "surrogateescape")
            self.key_ends.append(len(self.keys))
            self.members.append([0, -1, 0, -1, 0, -1])
        row = self.members[-1]
        if extension.endswith("npy"):
            self.arrays.append((len(self.members) - 1, offset, size))
            self.array_names.append(extension.removesuffix("npy").rstrip(".") or "npy")
            return None
        column = {"json": RECORD, "txt": TEXT}.get(extension, IMAGE)
        if row[column + 1] >= 0:
            # Of several images of one sample the best known format is read, whatever their order.
            rank = IMAGE_EXTENSIONS.index(extension) if column == IMAGE else self._image_rank
            self.refuse(name, Reason.DUPLICATE_MEMBER)
            if column != IMAGE or rank >= self._image_rank:
                return None
        if column == IMAGE:
            self._image_rank = IMAGE_EXTENSIONS.index(extension)
        row[column : column + 2] = [offset, size]
        return None

    def finish(self) -> ShardIndex:
        return ShardIndex(
            np.frombuffer(bytes(self.keys), dtype=np.uint8),
            np.array(self.key_ends, dtype=np.int64),
            np.array(self.members, dtype=np.int64).reshape(-1, 6),
            np.array(self.arrays, dtype=np.int64).reshape(-1, 3),
            self.array_names,
            dict(self.counts),
            self.examples,
        )


def build_index(path: str | Path) -> ShardIndex:
    """Read the headers of a tar shard. Damage ends the reading and is counted; it is never an error.

    Raises:
        PairtileError: the file cannot be opened, or is compressed.
    """
    path = Path(path)
    builder = _Builder()
    try:
        with path.open("rb") as file:
            if file.read(4)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
                raise PairtileError(f"{path} is compressed; samples are read at random, so unpack it to a plain .tar")
            file.seek(0)
            _scan(file, builder)
    except OSError as error:
        raise PairtileError(f"cannot read shard {path}: {error.strerror or error}") from None
    return builder.finish()


def _scan(file: Any, builder: _Builder) -> None:
    """Feed every regular member to the builder, and say how the archive ends."""
    total = os.fstat(file.fileno()).st_size
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller closes the file)
    except tarfile.ReadError:
        return builder.refuse("(archive)", Reason.TRUNCATED_TAR if total < 512 else Reason.CORRUPT_TAR)
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, ValueError, OverflowError):
            return builder.refuse("(end of archive)", Reason.TRUNCATED_TAR)
        if member is None:
            break
        archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header of the archive in memory
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            builder.refuse(member.name, Reason.NOT_A_FILE)
        elif member.offset_data + member.size > total:
            return builder.refuse(member.name, Reason.TRUNCATED_TAR)
        else:
            builder.add(member.name, member.offset_data, member.size)
    # tarfile stops in silence at the first header it cannot read; a whole archive ends in a block of zeros.
    file.seek(archive.offset - 512 if archive.offset == total else archive.offset)
    block = file.read(512)
    if len(block) < 512:
        builder.refuse("(end of archive)", Reason.TRUNCATED_TAR)
    elif block.strip(b"\0"):
        builder.refuse("(end of archive)", Reason.CORRUPT_TAR)
    return None


def _candidates(shard: Path) -> list[Path]:
    """Where the index of a shard may be, best first."""
    places = []
    folder = shard.parent
    # A folder without any write bit is meant to stay as it is, even for root, whom it would not stop.
    if folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) and os.access(folder, os.W_OK):
        places.append(folder / (shard.name + ".index.npz"))
    digest = hashlib.blake2b(str(shard.resolve()).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [*places, cache / "pairtile" / "index" / f"{digest}.npz"]


def _stamp(shard: Path) -> list[int]:
    status = shard.stat()
    return [INDEX_VERSION, status.st_size, status.st_mtime_ns]


def _load(place: Path, stamp: list[int]) -> ShardIndex | None:
    try:
        with np.load(place, allow_pickle=False) as data:
            meta = json.loads(data["meta"].tobytes())
            if meta["stamp"] != stamp:
                return None
            arrays = [data[name] for name in ("keys", "key_ends", "members", "arrays")]
    except (OSError, ValueError, KeyError, TypeError, EOFError, tarfile.TarError):
        return None
    except Exception as error:
        if type(error).__name__ != "BadZipFile":
            raise
        return None
    examples = [(str(name), str(reason)) for name, reason in meta["examples"]]
    keys, key_ends, members, extra = arrays
    return ShardIndex(keys, key_ends, members, extra, meta["array_names"], meta["counts"], examples)


def _save(index: ShardIndex, place: Path, stamp: list[int]) -> bool:
    meta = {
        "stamp": stamp,
        "array_names": index.array_names,
        "counts": index.counts,
        "examples": index.examples,
    }
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
                keys=index.keys,
                key_ends=index.key_ends,
                members=index.members,
                arrays=index.arrays,
            )
        os.chmod(temporary, 0o644)
        os.replace(temporary, place)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True


def load_index(shard: str | Path) -> ShardIndex:
    """The index of a shard, from disk if it is there and fits, else built and (where possible) kept.

    Raises:
        PairtileError: the shard cannot be read.
    """
    shard = Path(shard)
    try:
        stamp, places = _stamp(shard), _candidates(shard)
    except OSError as error:
        raise PairtileError(f"cannot read shard {shard}: {error.strerror or error}") from None
    for place in places:
        index = _load(place, stamp)
        if index is not None:
            return index
    index = build_index(shard)
    any(_save(index, place, stamp) for place in places)
    return index
