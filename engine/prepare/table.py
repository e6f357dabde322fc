"""Tables: CSV or TSV with one row, and JSONL with one object a line, for each image."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.schema import BadSample, Reason, parse_captions, sample_from_record
from ..errors import PairtileError
from .options import WriteOptions
from .report import PrepareReport
from .source import Extent, Item, Refused, path_inside
from .writer import write_dataset

# Columns with captions: one name, several (the name is the tag), or name -> tag.
CaptionColumns = str | Sequence[str] | Mapping[str, str]


def _tagged(columns: CaptionColumns) -> dict[str, str]:
    if isinstance(columns, str):
        return {columns: ""}
    return dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}


def _item(name: str, index: int, root: Path, allow_outside: bool, image: object, record: dict[str, Any]) -> Item:
    if not isinstance(image, str) or not image.strip():
        raise BadSample(Reason.MISSING_MEMBER, "no image path")
    path = path_inside(root, image.strip(), allow_outside)
    record.setdefault("labels", {}).setdefault("source", image.strip())
    return Item(name, sample_from_record(name, index, record), Extent(str(path)))


def _source_file(source: str | Path, root: str | Path | None) -> tuple[Path, Path]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise PairtileError(f"{path} is not a file; give the table that lists the images")
    folder = Path(root).expanduser() if root is not None else path.parent
    if not folder.is_dir():
        raise PairtileError(f"image root {folder} is not a folder; image paths in the table are relative to it")
    return path, folder


def _check_columns(path: Path, delimiter: str, wanted: list[str]) -> None:
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            header = next(csv.reader(file, delimiter=delimiter), [])
    except (OSError, csv.Error) as error:
        raise PairtileError(f"cannot read {path}: {error}") from None
    for name in wanted:
        if name not in header:
            near = difflib.get_close_matches(name, header, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PairtileError(f"{path} has no column {name!r}; its columns are {', '.join(header) or 'none'}{hint}")


def _csv_items(
    path: Path, root: Path, delimiter: str, image: str, captions: dict[str, str], id_column: str | None,
    labels: Sequence[str], allow_outside: bool,
) -> Iterator[Item | Refused]:  # fmt: skip
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        index = -1
        while True:
            index += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Refused(f"{path.name}:{rows.line_num}", Reason.BAD_ROW, str(error))
                continue
            name = f"{path.name}:{rows.line_num}"
            texts = [{"text": row[column] or "", "tag": tag} for column, tag in captions.items()]
            record: dict[str, Any] = {"captions": texts, "labels": {label: row[label] or "" for label in labels}}
            if id_column is not None:
                record["id"] = row[id_column]
            try:
                yield _item(name, index, root, allow_outside, row[image], record)
            except BadSample as bad:
                yield Refused(name, bad.reason, bad.detail)


def prepare_csv(
    source: str | Path,
    out: str | Path,
    *,
    image: str = "image",
    captions: CaptionColumns = "caption",
    id: str | None = None,
    labels: Sequence[str] = (),
    root: str | Path | None = None,
    delimiter: str | None = None,
    allow_outside: bool = False,
    options: WriteOptions | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Shards from a CSV or TSV file with a header.

    Args:
        image: column with the image's path, relative to ``root`` (default: the table's folder).
        captions: one column, several (each column's name becomes the tag), or a mapping of column to tag.
        id: column with what is the same thing (a number or any string); rows that share it match each other.
        labels: columns to keep as labels.
        delimiter: "," by default, a tab for ``.tsv``.
        allow_outside: also read absolute paths, ".." and links that lead out of ``root``.

    Raises:
        PairtileError: no such file, folder or column; see `write_dataset`.
    """
    path, folder = _source_file(source, root)
    delimiter = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    if len(delimiter) != 1:
        raise PairtileError(f"delimiter must be one character, got {delimiter!r}")
    tagged = _tagged(captions)
    _check_columns(path, delimiter, [image, *tagged, *([id] if id is not None else []), *labels])
    options = options or WriteOptions()
    settings = {
        "name": "csv", "source": str(path), "root": str(folder), "image": image, "captions": tagged, "id": id,
        "labels": list(labels), "options": asdict(options),
    }  # fmt: skip
    items = _csv_items(path, folder, delimiter, image, tagged, id, labels, allow_outside)
    return write_dataset(out, items, settings=settings, options=options, total=None, progress=progress)


def _jsonl_record(line: bytes, captions: dict[str, str] | None, id_key: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadSample(Reason.BAD_JSON, str(error)) from None
    if not isinstance(record, dict):
        raise BadSample(Reason.BAD_JSON, f"expected an object, found {type(record).__name__}")
    if captions is not None:
        found = [
            {"text": caption.text, "tag": caption.tag or tag}
            for key, tag in captions.items()
            for caption in parse_captions(record.pop(key, ""))
        ]
        record["captions"] = found
    if id_key != "id" and id_key in record:
        record["id"] = record.pop(id_key)
    return record


def _jsonl_items(
    path: Path, root: Path, image: str, captions: dict[str, str] | None, id_key: str, allow_outside: bool
) -> Iterator[Item | Refused]:
    with path.open("rb") as file:
        for index, line in enumerate(file):
            name = f"{path.name}:{index + 1}"
            if not line.strip():
                continue
            try:
                record = _jsonl_record(line, captions, id_key)
                yield _item(name, index, root, allow_outside, record.pop(image, None), record)
            except BadSample as bad:
                yield Refused(name, bad.reason, bad.detail)


def prepare_jsonl(
    source: str | Path,
    out: str | Path,
    *,
    image: str = "image",
    captions: CaptionColumns | None = None,
    id: str = "id",
    root: str | Path | None = None,
    allow_outside: bool = False,
    options: WriteOptions | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Shards from a file with one JSON object a line.

    Args:
        image: key of the image's path, relative to ``root`` (default: the file's folder).
        captions: keys of captions as in `prepare_csv` (values: a string, a list or a mapping of tag to string).
            None: the sample schema's own ``captions`` or ``caption``.
        id: key of what is the same thing. All other keys are read as the sample schema says.
        allow_outside: also read absolute paths, ".." and links that lead out of ``root``.

    Raises:
        PairtileError: no such file or folder; see `write_dataset`.
    """
    path, folder = _source_file(source, root)
    tagged = None if captions is None else _tagged(captions)
    options = options or WriteOptions()
    settings = {
        "name": "jsonl", "source": str(path), "root": str(folder), "image": image, "captions": tagged, "id": id,
        "options": asdict(options),
    }  # fmt: skip
    items = _jsonl_items(path, folder, image, tagged, id, allow_outside)
    return write_dataset(out, items, settings=settings, options=options, total=None, progress=progress)
