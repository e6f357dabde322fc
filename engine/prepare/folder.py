"""A folder of images, with captions in files beside them or in the names of the sub-folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from ..data.members import IMAGE_EXTENSIONS, UNSAFE_EXTENSIONS
from ..data.schema import BadSample, Reason, parse_id, sample_from_record
from ..errors import PairtileError
from .options import WriteOptions
from .report import PrepareReport
from .source import Extent, Item, Refused, path_inside, read_extent
from .writer import write_dataset

_SIDECARS = ("txt", "json")


def _list_files(root: Path) -> list[str]:
    """All files below a folder as paths relative to it, sorted; linked folders are not entered."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not os.path.islink(os.path.join(folder, name))]
        names += [os.path.relpath(os.path.join(folder, name), root) for name in files]
    return sorted(names)


def _group(names: list[str]) -> tuple[dict[str, dict[str, str]], list[Refused]]:
    """({path without extension: {"image" | "txt" | "json": path}}, what is not taken)."""
    groups: dict[str, dict[str, str]] = {}
    refused = []
    for name in names:
        stem, dotted = os.path.splitext(name)
        extension = dotted.lower().lstrip(".")
        if extension in UNSAFE_EXTENSIONS:
            refused.append(Refused(name, Reason.UNSAFE_TYPE))
        elif extension not in IMAGE_EXTENSIONS and extension not in _SIDECARS:
            refused.append(Refused(name, Reason.UNKNOWN_TYPE))
        else:
            role = extension if extension in _SIDECARS else "image"
            taken = groups.setdefault(stem, {}).setdefault(role, name)
            if taken != name:
                refused.append(Refused(name, Reason.DUPLICATE_MEMBER, f"{taken} has the same name"))
    return groups, refused


def _sidecar_item(root: Path, index: int, stem: str, files: dict[str, str], allow_outside: bool) -> Item:
    texts = {
        role: read_extent(Extent(str(path_inside(root, files[role], allow_outside))))
        for role in _SIDECARS
        if role in files
    }
    if "image" not in files:
        raise BadSample(Reason.MISSING_MEMBER, "no image beside it")
    try:
        record = json.loads(texts.get("json", b"{}"))
        text = texts["txt"].decode("utf-8-sig") if "txt" in texts else None
    except UnicodeDecodeError as error:
        raise BadSample(Reason.BAD_TEXT, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadSample(Reason.BAD_JSON, str(error)) from None
    if not isinstance(record, dict):
        raise BadSample(Reason.BAD_JSON, f"expected an object, found {type(record).__name__}")
    if text is not None:
        record.setdefault("captions", text.splitlines())
    sample = sample_from_record(stem, index, record)
    return Item(files["image"], sample, Extent(str(path_inside(root, files["image"], allow_outside))))


def _folder_item(root: Path, index: int, stem: str, files: dict[str, str], allow_outside: bool) -> Item:
    if "image" not in files:
        raise BadSample(Reason.MISSING_MEMBER, "no image beside it")
    folder = os.path.dirname(files["image"])
    caption = os.path.basename(folder).replace("_", " ").replace("-", " ")
    record = {"captions": [caption], "id": parse_id("folder:" + folder), "labels": {"folder": folder}}
    sample = sample_from_record(stem, index, record)
    return Item(files["image"], sample, Extent(str(path_inside(root, files["image"], allow_outside))))


def _items(root: Path, names: list[str], captions: str, allow_outside: bool) -> Iterator[Item | Refused]:
    groups, refused = _group(names)
    yield from refused
    read = _sidecar_item if captions == "sidecar" else _folder_item
    for index, (stem, files) in enumerate(groups.items()):
        try:
            yield read(root, index, stem, files, allow_outside)
        except BadSample as bad:
            yield Refused(files.get("image", stem), bad.reason, bad.detail)


def prepare_folder(
    source: str | Path,
    out: str | Path,
    *,
    captions: Literal["sidecar", "folder"] = "sidecar",
    allow_outside: bool = False,
    options: WriteOptions | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Shards from all images below a folder.

    Args:
        captions: "sidecar": ``a/cat.jpg`` goes with ``a/cat.txt`` (one caption a line) or ``a/cat.json`` (the
            fields of the sample schema). "folder": the name of the folder that an image lies in, "_" and "-"
            read as spaces; images of one folder share an id, so whole folders go to val.
        allow_outside: also read links that lead out of the folder.

    Raises:
        PairtileError: no such folder; see `write_dataset`.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise PairtileError(f"{root} is not a folder; give the folder that holds the images")
    if captions not in ("sidecar", "folder"):
        raise PairtileError(f"captions must be sidecar or folder, got {captions!r}")
    options = options or WriteOptions()
    names = _list_files(root)
    settings = {"name": "folder", "source": str(root), "captions": captions, "options": asdict(options)}
    items = _items(root, names, captions, allow_outside)
    return write_dataset(out, items, settings=settings, options=options, total=None, progress=progress)
