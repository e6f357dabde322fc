"""What one sample is: the fields that shards may carry and how they are read. README.md shows it by example."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

_DECIMAL = re.compile(r"-?[0-9]{1,18}")


class Reason:
    """Why something was left out. Training, evaluation and prepare count under the same names."""

    UNDECODABLE_IMAGE = "undecodable image"
    IMAGE_TOO_LARGE = "image too large"
    AUGMENTATION_FAILED = "augmentation failed"
    EMPTY_CAPTION = "empty caption"
    NO_WANTED_CAPTION = "no caption with a wanted tag"
    MISSING_MEMBER = "missing member"
    BAD_JSON = "bad json"
    BAD_ARRAY = "bad array"
    BAD_TEXT = "text is not utf-8"
    BAD_ROW = "bad row"
    UNREADABLE = "unreadable file"
    TRUNCATED_TAR = "truncated tar"
    CORRUPT_TAR = "corrupt tar"
    DUPLICATE_MEMBER = "duplicate member"
    UNSAFE_PATH = "unsafe path"
    UNSAFE_TYPE = "unsafe file type"
    UNKNOWN_TYPE = "unknown file type"
    NOT_A_FILE = "link or device"


class BadSample(Exception):
    """One sample cannot be used; ``reason`` is one of `Reason`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Caption(NamedTuple):
    """A text and where it comes from: a source ("alt", "blip") or a language ("en"); "" when untagged."""

    text: str
    tag: str = ""


@dataclass(slots=True)
class Sample:
    """One image with everything that is known about it.

    Attributes:
        key: the name that the members of the sample share in their shard.
        index: position in the split (shards in order, samples in order).
        image: the encoded image, bytes of a PNG, JPEG, WebP, BMP, GIF, TIFF or PPM file.
        captions: at least one, none blank.
        id: what is the same thing. Samples that share it are correct matches for each other. Without one in
            the JSON it is ``index``: give every sample of a split an id, or none.
        ids: further equivalences by name (glyphs: "drawing", equal where the pixels are).
        scores, flags, labels: numbers, truths and strings by name.
        boxes: [x0, y0, x1, y1] each, as fractions of the image's width and height.
        arrays: teacher embeddings and the like, from ``.npy`` members, by name.
    """

    key: str
    index: int
    image: bytes
    captions: list[Caption]
    id: int
    ids: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    boxes: list[list[float]] = field(default_factory=list)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def parse_id(value: object) -> int:
    """An id as a signed 64-bit integer: integers as they are (up to 18 digits in a string), other
    strings by a stable hash.

    Raises:
        BadSample: neither an integer of 64 bits nor a string.
    """
    if isinstance(value, str):
        if _DECIMAL.fullmatch(value):
            return int(value)
        digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63:
        raise BadSample(Reason.BAD_JSON, f"id {value!r} is neither a 64-bit integer nor a string")
    return value


def _caption(value: object, tag: str) -> Caption:
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        tag = str(value.get("tag") or value.get("source") or value.get("lang") or tag)
        value = value["text"]
    if not isinstance(value, str):
        raise BadSample(Reason.BAD_JSON, f"a caption must be a string or {{text, tag}}, not {value!r:.80}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise BadSample(Reason.BAD_TEXT, "half of a surrogate pair")  # JSON may spell it; tokenizers refuse it
    return Caption(value, tag)


def parse_captions(value: object) -> list[Caption]:
    """Captions from JSON: a string, a list of strings or {text, tag}, or a mapping of tag to string or list.

    Blank texts are left out, white space around a text is stripped.

    Raises:
        BadSample: any other shape.
    """
    if isinstance(value, dict) and not isinstance(value.get("text"), str):
        pairs = [
            (tag, text) for tag, texts in value.items() for text in (texts if isinstance(texts, list) else [texts])
        ]
    else:
        pairs = [("", text) for text in (value if isinstance(value, list) else [value])]
    captions = [_caption(text, str(tag)) for tag, text in pairs]
    return [Caption(stripped, tag) for text, tag in captions if (stripped := text.strip())]


def _json_object(data: bytes | None) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(Reason.BAD_JSON, str(error)) from None
    if not isinstance(record, dict):
        raise BadSample(Reason.BAD_JSON, f"expected an object, found {type(record).__name__}")
    return record


def _number(value: object) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond the largest float
        pass
    raise BadSample(Reason.BAD_JSON, f"{str(value)[:80]!r} is not a finite number")


def _mapping(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.pop(name, None) or {}
    if not isinstance(value, dict):
        raise BadSample(Reason.BAD_JSON, f"{name} must be an object, not {type(value).__name__}")
    return value


def parse_sample(
    key: str,
    index: int,
    image: bytes,
    record_bytes: bytes | None,
    text_bytes: bytes | None,
    arrays: dict[str, NDArray[Any]] | None = None,
) -> Sample:
    """A `Sample` from its members: the image, the ``.json`` and the ``.txt`` (either may be None).

    Raises:
        BadSample: as `sample_from_record`; JSON or text that cannot be read.
    """
    record = _json_object(record_bytes)
    text = None
    if text_bytes is not None and "captions" not in record:
        try:
            text = text_bytes.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample(Reason.BAD_TEXT, str(error)) from None
    sample = sample_from_record(key, index, record, text)
    sample.image = image
    sample.arrays = arrays or {}
    return sample


def sample_from_record(key: str, index: int, record: dict[str, Any], text: str | None = None) -> Sample:
    """A `Sample`, without its image, from the fields of its JSON (which are used up).

    Captions come from ``captions``, else from ``text`` (the ``.txt``), else from ``caption``. Other top-level
    fields are sorted by type: strings into labels, truths into flags, numbers into scores.

    Raises:
        BadSample: no caption, or fields that do not follow the schema.
    """
    single = record.pop("caption", None)
    if "captions" in record:
        captions = parse_captions(record.pop("captions"))
    elif text is not None or single is not None:
        captions = parse_captions(text if text is not None else single)
    else:
        raise BadSample(Reason.MISSING_MEMBER, "neither captions in the .json nor a .txt")
    if not captions:
        raise BadSample(Reason.EMPTY_CAPTION)

    sample = Sample(key, index, b"", captions, parse_id(record.pop("id", index)))
    sample.ids = {name: parse_id(value) for name, value in _mapping(record, "ids").items()}
    sample.scores = {name: _number(value) for name, value in _mapping(record, "scores").items()}
    sample.flags = {name: bool(value) for name, value in _mapping(record, "flags").items()}
    sample.labels = {name: str(value) for name, value in _mapping(record, "labels").items()}
    for box in record.pop("boxes", None) or ():
        if not isinstance(box, list) or len(box) != 4:
            raise BadSample(Reason.BAD_JSON, f"a box must be [x0, y0, x1, y1], not {box!r:.80}")
        sample.boxes.append([_number(edge) for edge in box])
    for name, value in record.items():
        if isinstance(value, str):
            sample.labels.setdefault(name, value)
        elif isinstance(value, bool):
            sample.flags.setdefault(name, value)
        elif isinstance(value, int | float):
            sample.scores.setdefault(name, _number(value))
    return sample


def record_of(sample: Sample) -> dict[str, Any]:
    """The JSON object from which `sample_from_record` makes the same sample; empty fields are left out."""
    fields = {
        "captions": [caption._asdict() if caption.tag else caption.text for caption in sample.captions],
        "id": sample.id,
        "ids": sample.ids,
        "scores": sample.scores,
        "flags": sample.flags,
        "labels": sample.labels,
        "boxes": sample.boxes,
    }
    return {name: value for name, value in fields.items() if value or name == "id"}
