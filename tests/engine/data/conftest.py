"""Small shards written by hand with tarfile, so that the reader is not tested against the package's own writer."""

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

from pairtile.engine.data import DataConfig, ShardDataset, Tokenizer, build_image_transform, train_tokenizer

Member = tuple[str, bytes | tarfile.TarInfo]


def png(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return data.getvalue()


def write_tar(path: Path, members: list[Member]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def members_of(number: int) -> list[Member]:
    captions = [
        {"text": f"number {number}", "tag": "en"},
        {"text": f"nummer {number}", "tag": "de"},
        {"text": f"cipher {number}", "tag": "en"},
    ]
    record = {
        "captions": captions,
        "id": number // 2,
        "ids": {"third": number // 3},
        "flags": {"even": number % 2 == 0},
    }
    return [
        (f"s{number:03d}.png", png(number)),
        (f"s{number:03d}.json", json.dumps({**record, "colour": "noise", "weight": number / 2}).encode()),
    ]


@pytest.fixture(name="png")
def _png() -> Callable[..., bytes]:
    return png


@pytest.fixture(name="blank_png")
def _blank_png() -> Callable[[int, int], bytes]:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def build(width: int, height: int) -> bytes:
        """A valid PNG of one-bit black pixels: 50 MB of them at 20,000 x 20,000 make a file of 50 kB."""
        packer = zlib.compressobj(1)
        row = b"\0" * (1 + (width + 7) // 8)
        rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

    return build


@pytest.fixture(name="write_tar")
def _write_tar() -> Callable[[Path, list[Member]], Path]:
    return write_tar


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 shards with 50 samples and a tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, numbers in enumerate((range(20), range(20, 21), range(21, 50))):
        write_tar(folder / f"train-{shard:06d}.tar", [member for n in numbers for member in members_of(n)])
    train_tokenizer((f"number {n}" for n in range(50)), 300, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(shards: Path) -> Tokenizer:
    from pairtile.engine.data import load_tokenizer

    return load_tokenizer(shards)


@pytest.fixture
def open_split(tokenizer: Tokenizer) -> Callable[..., ShardDataset]:
    """open_split(folder, pattern=..., seed=..., train=..., **DataConfig fields)."""

    def open_it(
        root: Path, pattern: str = "train-*.tar", *, seed: int = 7, train: bool = True, **fields: object
    ) -> ShardDataset:
        config = DataConfig.model_validate({"root": str(root), "context_length": 8, **fields})
        transform = build_image_transform(config, 8, train)
        return ShardDataset(pattern, config=config, tokenizer=tokenizer, transform=transform, seed=seed)

    return open_it
