"""JSON and text members to samples, and back."""

from __future__ import annotations

import json

import pytest

from pairtile.engine.data import BadSample, Caption, Reason
from pairtile.engine.data.schema import parse_id, parse_sample, record_of, sample_from_record


def parse(record: object, text: bytes | None = None):
    data = record if isinstance(record, bytes) or record is None else json.dumps(record).encode()
    return parse_sample("k", 5, b"", data, text)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ("one", [Caption("one")]),
        ([" one ", "two"], [Caption("one"), Caption("two")]),
        ([{"text": "one", "tag": "a"}, {"text": "two", "source": "b"}], [Caption("one", "a"), Caption("two", "b")]),
        ({"en": "one", "de": ["eins", "ein"]}, [Caption("one", "en"), Caption("eins", "de"), Caption("ein", "de")]),
        (["", "two", "  "], [Caption("two")]),
    ],
)
def test_caption_shapes(captions: object, expected: list[Caption]) -> None:
    assert parse({"captions": captions}).captions == expected


def test_captions_come_from_json_then_txt_then_caption() -> None:
    assert parse({"captions": ["a"], "caption": "c"}, b"b").captions == [Caption("a")]
    assert parse({"caption": "c"}, b"\xef\xbb\xbfb\n").captions == [Caption("b")]
    assert parse({"caption": "c"}).captions == [Caption("c")]
    assert parse(None, b"b").captions == [Caption("b")]


def test_fields_and_round_trip() -> None:
    record = {
        "captions": ["x"], "id": 9, "ids": {"drawing": 4}, "scores": {"clip": 0.3}, "flags": {"nsfw": False},
        "labels": {"set": "noto"}, "boxes": [[0, 0, 0.5, 1]], "group": "Flags", "aesthetic": 5, "watermark": True,
        "tags": {"en": ["y"]},
    }  # fmt: skip
    sample = parse(record)
    assert (sample.id, sample.ids) == (9, {"drawing": 4})
    assert sample.scores == {"clip": 0.3, "aesthetic": 5.0}
    assert sample.flags == {"nsfw": False, "watermark": True}
    assert sample.labels == {"set": "noto", "group": "Flags"}
    assert sample.boxes == [[0.0, 0.0, 0.5, 1.0]]
    assert sample_from_record("k", 5, json.loads(json.dumps(record_of(sample)))) == sample


def test_ids() -> None:
    assert parse({"captions": ["x"]}).id == 5
    assert parse_id("17") == parse_id(17) == 17
    assert parse_id("B-17") == parse_id("B-17") != parse_id("B-18")
    assert 0 <= parse_id("9" * 30) < 1 << 63
    for bad in (1.5, None, True, [1], 1 << 63):
        with pytest.raises(BadSample):
            parse_id(bad)


@pytest.mark.parametrize(
    ("record", "text", "reason"),
    [
        (b"{", None, Reason.BAD_JSON),
        (b"[" * 100_000, None, Reason.BAD_JSON),
        ([1], None, Reason.BAD_JSON),
        ({"captions": 3}, None, Reason.BAD_JSON),
        ({"captions": ["x"], "boxes": [[1, 2]]}, None, Reason.BAD_JSON),
        ({"captions": ["x"], "scores": {"s": "high"}}, None, Reason.BAD_JSON),
        (b'{"captions": ["x"], "s": NaN}', None, Reason.BAD_JSON),
        (b'{"captions": ["x"], "s": 1' + b"0" * 400 + b"}", None, Reason.BAD_JSON),
        (b'{"captions": ["\\ud800"]}', None, Reason.BAD_TEXT),
        (None, b"\xff\xfe", Reason.BAD_TEXT),
        ({"captions": ["", " "]}, None, Reason.EMPTY_CAPTION),
        (None, b" \n", Reason.EMPTY_CAPTION),
        ({"id": 1}, None, Reason.MISSING_MEMBER),
        (None, None, Reason.MISSING_MEMBER),
    ],
)
def test_bad_samples(record: object, text: bytes | None, reason: str) -> None:
    with pytest.raises(BadSample) as raised:
        parse(record, text)
    assert raised.value.reason == reason
