"""A split of a data set: the shards that patterns name, as one sequence of samples read at random."""

from __future__ import annotations

import glob
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from ..errors import PairtileError
from .shard_index import ShardIndex, load_index

_MAX_OPEN = 64


def expand_shards(patterns: str | Path | Sequence[str | Path], root: str | Path | None = None) -> list[Path]:
    """Shard files named by globs and braces ("train-{000000..000003}.tar"), relative to ``root`` or absolute.

    Raises:
        PairtileError: the folder is missing, a named shard is missing, nothing matches, or a URL was given.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    folder = Path(root).expanduser() if root is not None else None
    if folder is not None and not folder.is_dir():
        raise PairtileError(
            f"data.root: {folder} is not a folder; expected one with .tar shards, "
            f"for example from `pairtile prepare glyphs --out {folder}`"
        )
    shards: list[Path] = []
    for pattern in map(str, patterns):
        if "://" in pattern or pattern.startswith("pipe:"):
            raise PairtileError(f"shards {pattern!r}: only local files are read; copy the shards to a local folder")
        try:
            names = list(braceexpand(pattern))
        except ValueError:
            raise PairtileError(f"shards {pattern!r}: the braces don't pair") from None
        for name in names:
            path = Path(name).expanduser()
            path = folder / path if folder is not None else path
            if glob.has_magic(name):
                shards += sorted(Path(match) for match in glob.glob(str(path)) if os.path.isfile(match))
            elif path.is_file():
                shards.append(path)
            else:
                raise PairtileError(f"shard {path} does not exist; check the pattern {pattern!r}")
    if not shards:
        listed = ", ".join(map(repr, map(str, patterns)))
        where = folder if folder is not None else Path.cwd()
        raise PairtileError(
            f"no shards match {listed} in {where}; prepare a data set there, "
            f"for example `pairtile prepare glyphs --out DIR`, or correct the pattern"
        )
    return list(dict.fromkeys(shards))


class ShardSet:
    """The samples of several shards, numbered 0 .. n-1 in the order of the shards and of their members.

    Holds the indexes as a few numpy arrays (some 80 bytes a sample, shared by forked workers) and at most 64
    open files. Reads are positional, so forked processes may share it.

    Attributes:
        counts: members left out when the shards were indexed, by reason.
        examples: the first ("shard:member", reason) of them.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        indexes = [load_index(path) for path in paths]
        self.paths = list(paths)
        self.starts = np.cumsum([0, *map(len, indexes)])
        self.counts = dict(sum((Counter(index.counts) for index in indexes), Counter[str]()))
        self.examples = [(f"{p}:{name}", why) for p, i in zip(paths, indexes) for name, why in i.examples]
        self._keys = np.concatenate([index.keys for index in indexes])
        key_starts = np.cumsum([0, *(len(index.keys) for index in indexes)])
        self._key_ends = np.concatenate([index.key_ends + start for index, start in zip(indexes, key_starts)])
        self._members = np.concatenate([index.members for index in indexes])
        self._arrays = self._array_table(indexes)
        self._files: OrderedDict[int, int] = OrderedDict()

    def _array_table(self, indexes: list[ShardIndex]) -> dict[int, list[tuple[str, int, int]]]:
        table: dict[int, list[tuple[str, int, int]]] = {}
        for index, start in zip(indexes, self.starts):
            for name, (sample, offset, size) in zip(index.array_names, index.arrays.tolist()):
                table.setdefault(int(start) + sample, []).append((name, offset, size))
        return table

    def __len__(self) -> int:
        return len(self._key_ends)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict()}

    def key(self, index: int) -> str:
        start = self._key_ends[index - 1] if index else 0
        return self._keys[start : self._key_ends[index]].tobytes().decode("utf-8", "replace")

    def locate(self, index: int) -> tuple[int, NDArray[np.int64], list[tuple[str, int, int]]]:
        """(shard number, members [6] as in `ShardIndex`, ``.npy`` members as (name, offset, size))."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, self._members[index], self._arrays.get(index, [])

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """``size`` bytes of a shard; fewer if the file has become shorter. Raises OSError."""
        handle = self._files.get(shard)
        if handle is None:
            if len(self._files) >= _MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            handle = self._files[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(handle, size, offset)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()
