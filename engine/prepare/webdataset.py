"""Tar shards made by others (webdataset layout): read by their index, checked, and written anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from ..data.schema import BadSample, Reason, parse_sample
from ..data.shard_index import IMAGE, RECORD, TEXT
from ..data.shards import ShardSet, expand_shards
from .options import WriteOptions
from .report import PrepareReport
from .source import Extent, Item, Refused, read_extent
from .writer import write_dataset


def _item(shards: ShardSet, index: int) -> Item:
    shard, members, arrays = shards.locate(index)
    path = str(shards.paths[shard])

    def extent(column: int) -> Extent | None:
        offset, size = int(members[column]), int(members[column + 1])
        return Extent(path, offset, size) if size >= 0 else None

    image, record, text = extent(IMAGE), extent(RECORD), extent(TEXT)
    if image is None:
        raise BadSample(Reason.MISSING_MEMBER, "no image")
    sample = parse_sample(
        shards.key(index), index, b"",
        None if record is None else read_extent(record), None if text is None else read_extent(text),
    )  # fmt: skip
    return Item(
        f"{shards.paths[shard].name}:{sample.key}",
        sample,
        image,
        {name: Extent(path, offset, size) for name, offset, size in arrays},
    )


def _items(shards: ShardSet) -> Iterator[Item | Refused]:
    listed = dict.fromkeys(shards.counts, 0)
    for member, reason in shards.examples:
        listed[reason] += 1
        yield Refused(member, reason)
    for reason, count in shards.counts.items():  # an index lists the first thousand and counts the others
        for _ in range(count - listed[reason]):
            yield Refused("(member not listed)", reason)
    for index in range(len(shards)):
        try:
            yield _item(shards, index)
        except BadSample as bad:
            shard, _, _ = shards.locate(index)
            yield Refused(f"{shards.paths[shard].name}:{shards.key(index)}", bad.reason, bad.detail)


def prepare_webdataset(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    options: WriteOptions | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Shards in pairtile's schema from tar shards: image, ``.json`` and/or ``.txt``, and ``.npy`` members.

    Members with unsafe names or of other types are left out and counted; nothing is extracted or unpickled. A
    damaged shard gives what can be read of it.

    Args:
        source: a folder (all its ``.tar``), or shards by glob and brace patterns.

    Raises:
        PairtileError: no shard matches; see `write_dataset`.
    """
    if isinstance(source, str | Path) and Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser() / "*.tar")
    shards = ShardSet(expand_shards(source))
    options = options or WriteOptions()
    settings = {"name": "webdataset", "source": str(source), "options": asdict(options)}
    total = len(shards) + sum(shards.counts.values())
    return write_dataset(out, _items(shards), settings=settings, options=options, total=total, progress=progress)
