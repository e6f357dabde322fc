"""How a person's own data is written; the same for every kind of source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..data.config import MAX_PIXELS, MAX_SIDE
from ..errors import PairtileError

Format = Literal["keep", "jpeg", "png", "webp"]


@dataclass(frozen=True)
class WriteOptions:
    """Options of `prepare_folder`, `prepare_csv`, `prepare_jsonl` and `prepare_webdataset`.

    Attributes:
        size: images with a longer side are scaled down to it, aspect kept; None keeps all sizes.
        format: of images that are encoded again. "keep": JPEG, PNG and WebP stay what they are, others become
            PNG. An image that needs no change is copied byte for byte.
        quality: of JPEG and WebP, 1 to 100.
        val_fraction: part of the ids that goes to the split ``val``, by a hash of the id: samples that
            share an id stay together, and a sample stays on its side when others come or go.
        seed: of that hash.
        samples_per_shard: a shard is closed at this many samples, or at 1 GiB.
        vocab_size: of the tokenizer that is trained on the captions of train; 0: none is trained.
        max_pixels, max_side: a larger image is dropped by its header, before it is decoded.
        workers: processes; None: one for each processor.

    Raises:
        PairtileError: a value out of its range.
    """

    size: int | None = None
    format: Format = "keep"
    quality: int = 90
    val_fraction: float = 0.05
    seed: int = 0
    samples_per_shard: int = 4096
    vocab_size: int = 8192
    max_pixels: int = MAX_PIXELS
    max_side: int = MAX_SIDE
    workers: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("size", self.size is None or self.size >= 1, "at least 1"),
            ("format", self.format in get_args(Format), f"one of {', '.join(get_args(Format))}"),
            ("quality", 1 <= self.quality <= 100, "between 1 and 100"),
            ("val_fraction", 0 <= self.val_fraction < 1, "at least 0 and below 1"),
            ("samples_per_shard", self.samples_per_shard >= 1, "at least 1"),
            ("vocab_size", self.vocab_size == 0 or self.vocab_size >= 259, "0 or at least 259"),
            ("max_pixels", self.max_pixels >= 1, "at least 1"),
            ("max_side", self.max_side >= 1, "at least 1"),
            ("workers", self.workers is None or self.workers >= 1, "at least 1"),
        )
        for name, good, expected in rules:
            if not good:
                raise PairtileError(f"{name} must be {expected}, got {getattr(self, name)!r}")
