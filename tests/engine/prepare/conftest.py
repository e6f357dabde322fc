"""Images to prepare, and a look at what was written."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pairtile.engine.data import DataConfig, Sample, ShardDataset, build_image_transform
from pairtile.engine.prepare import WriteOptions


def picture(seed: int, size: tuple[int, int] = (12, 8), format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format=format)
    return data.getvalue()


@pytest.fixture(name="picture")
def _picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture
def bomb_png() -> bytes:
    """The beginning of a PNG of 20,000 x 20,000 pixels, as much of it as is looked at."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, body)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def options() -> WriteOptions:
    return WriteOptions(val_fraction=0.2, vocab_size=300, workers=1)


@pytest.fixture
def read_back() -> Callable[[Path, str], list[Sample]]:
    """All samples of a split, read and decoded by the loader's own code."""

    def read(folder: Path, split: str) -> list[Sample]:
        config = DataConfig.model_validate({"root": str(folder)})
        transform = build_image_transform(config, 8, False)
        dataset = ShardDataset(f"{split}-*.tar", config=config, tokenizer=None, transform=transform)
        assert dataset.counts == {}
        return [dataset.sample(index) for index in range(len(dataset))]

    return read


@pytest.fixture
def dropped() -> Callable[[Path], dict[str, str]]:
    """dropped.jsonl as {source: reason}."""

    def read(folder: Path) -> dict[str, str]:
        lines = (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
        return {line["source"]: line["reason"] for line in map(json.loads, lines)}

    return read


@pytest.fixture
def names_in() -> Callable[[Path], list[str]]:
    def read(shard: Path) -> list[str]:
        with tarfile.open(shard) as archive:
            return archive.getnames()

    return read
