"""From items to shards: images checked and converted in processes, shards written in order by this one."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..data.arrays import parse_array
from ..data.images import convert_image, decode_image
from ..data.schema import BadSample, Reason, record_of, sample_from_record
from ..data.shard_index import RECORD, load_index
from ..data.shards import ShardSet
from ..data.tokenizer import train_tokenizer
from ..errors import PairtileError
from .options import WriteOptions
from .output import Dropped, ShardWriter, atomic_folder, require_free, write_description
from .pool import default_workers, ordered_map, progress_bar
from .report import PrepareReport
from .source import Item, Refused, read_extent

_CHUNK = 16
_MAX_SHARD_BYTES = 1 << 30
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def convert_bytes(data: bytes, options: WriteOptions) -> tuple[bytes, str]:
    """(encoded image, extension) within the options' size and format; unchanged bytes where nothing is to do.

    Raises:
        BadSample: undecodable or too large.
    """
    image = decode_image(data, max_pixels=options.max_pixels, max_side=options.max_side)
    was = image.format or ""
    target = options.format.upper() if options.format != "keep" else was if was in _EXTENSIONS else "PNG"
    scale = 1.0 if options.size is None else min(1.0, options.size / max(image.size))
    if was == target and scale == 1.0:
        return data, _EXTENSIONS[target]
    grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    image = convert_image(image, "L" if grey else "RGB")
    if scale < 1.0:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    try:
        image.save(encoded, format=target, quality=options.quality)
    except (OSError, ValueError) as error:
        raise BadSample(Reason.IMAGE_TOO_LARGE, f"cannot be written as {target}: {error}") from None
    return encoded.getvalue(), _EXTENSIONS[target]


class _Ready(NamedTuple):
    """The members of one sample, name suffix -> bytes."""

    members: list[tuple[str, bytes]]


def _ready(item: Item, options: WriteOptions) -> _Ready:
    image, extension = convert_bytes(read_extent(item.image), options)
    members = [(extension, image)]
    for name, extent in item.arrays.items():
        data = read_extent(extent)
        parse_array(data)
        members.append((f"{name}.npy", data))
    return _Ready(members)


def _ready_chunk(chunk: list[Item | Refused], options: WriteOptions) -> list[_Ready | Refused]:
    """What a worker process does."""
    done: list[_Ready | Refused] = []
    for item in chunk:
        if isinstance(item, Refused):
            done.append(item)
            continue
        try:
            done.append(_ready(item, options))
        except BadSample as bad:
            done.append(Refused(item.source, bad.reason, bad.detail))
    return done


def _in_val(sample_id: int, options: WriteOptions) -> bool:
    digest = hashlib.blake2b(f"{options.seed}:{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < options.val_fraction * 2**64


class _SplitWriter:
    """The shards of one split, one after the other."""

    def __init__(self, folder: Path, split: str, samples_per_shard: int) -> None:
        self.folder = folder
        self.split = split
        self.samples_per_shard = samples_per_shard
        self.samples = 0
        self.paths: list[Path] = []
        self._room = self._bytes = 0
        self._shard: ShardWriter | None = None

    def add(self, key: str, members: list[tuple[str, bytes]]) -> None:
        if self._shard is None or self._room == 0 or self._bytes > _MAX_SHARD_BYTES:
            self.close()
            self.paths.append(self.folder / f"{self.split}-{len(self.paths):06d}.tar")
            self._shard, self._room, self._bytes = ShardWriter(self.paths[-1]), self.samples_per_shard, 0
        for extension, data in members:
            self._shard.add(f"{key}.{extension}", data)
            self._bytes += len(data)
        self._room -= 1
        self.samples += 1

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            load_index(self.paths[-1])  # leaves the index beside the shard
            self._shard = None


def _chunks(items: Iterable[Item | Refused]) -> Iterator[list[Item | Refused]]:
    stream = iter(items)
    while chunk := list(islice(stream, _CHUNK)):
        yield chunk


def _captions(paths: list[Path]) -> Iterator[str]:
    shards = ShardSet(paths)
    for index in range(len(shards)):
        shard, members, _ = shards.locate(index)
        record = json.loads(shards.read(shard, int(members[RECORD]), int(members[RECORD + 1])))
        for caption in sample_from_record("", index, record).captions:
            yield caption.text


def write_dataset(
    out: str | Path,
    items: Iterable[Item | Refused],
    *,
    settings: dict[str, Any],
    options: WriteOptions,
    total: int | None,
    progress: bool,
) -> PrepareReport:
    """Write items into ``out``: shards of the splits train and val, tokenizer.json, dataset.json, dropped.jsonl.

    Samples are numbered as they come; each keeps its origin in labels.source. ``out`` appears when everything
    is written.

    Raises:
        PairtileError: ``out`` is not free or cannot be written; no usable sample is left for train.
    """
    started = time.monotonic()
    out = Path(out).expanduser().absolute()
    require_free(out)
    workers = default_workers() if options.workers is None else options.workers
    with atomic_folder(out) as folder, progress_bar(progress) as bar:
        task = bar.add_task("writing shards", total=total)
        dropped = Dropped(folder)
        splits = {name: _SplitWriter(folder, name, options.samples_per_shard) for name in ("train", "val")}
        number = 0
        for chunk, done in ordered_map(partial(_ready_chunk, options=options), _chunks(items), workers=workers):
            for item, result in zip(chunk, done):
                if isinstance(result, Refused):
                    dropped.add(*result)
                elif isinstance(item, Item):
                    item.sample.labels.setdefault("source", item.source)
                    record = json.dumps(record_of(item.sample)).encode()
                    split = splits["val" if _in_val(item.sample.id, options) else "train"]
                    split.add(f"{number:09d}", [*result.members, ("json", record)])
                    number += 1
            bar.update(task, advance=len(chunk), refresh=True)
        dropped.close()
        for split in splits.values():
            split.close()
        counts = {name: split.samples for name, split in splits.items()}
        if not counts["train"]:
            reasons = (
                ", ".join(f"{count} {reason}" for reason, count in dropped.counts.items()) or "the source is empty"
            )
            raise PairtileError(
                f"no sample is left for training in {settings['source']}: {reasons}; val got {counts['val']}"
            )
        if options.vocab_size:
            train_tokenizer(_captions(splits["train"].paths), options.vocab_size, folder)
        described = {name: {"samples": count, "shards": f"{name}-*.tar"} for name, count in counts.items() if count}
        write_description(folder, {"settings": settings, "splits": described, "dropped": dict(dropped.counts)})
    listed = out / dropped.path.name if dropped.counts else None
    seconds = time.monotonic() - started
    return PrepareReport(out, sum(counts.values()), counts, dict(dropped.counts), listed, seconds=seconds)
