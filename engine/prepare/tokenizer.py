"""A tokenizer for shards that come without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..data import BadSample, CaptionChoice, DataConfig, ShardDataset, Tokenizer, filter_captions, train_tokenizer
from ..errors import PairtileError


def prepare_tokenizer(
    root: str | Path,
    out: str | Path,
    *,
    train: str | Sequence[str] = "train-*.tar",
    tags: Sequence[str] | None = None,
    vocab_size: int = 8192,
) -> Tokenizer:
    """Train a byte-level BPE on the training captions of shards and write it to ``out``.

    Args:
        root: folder of the shards. train: patterns of the training shards in it.
        out: a folder, for the key ``data.tokenizer`` of a recipe; ``root`` itself needs no such key.
        tags: sources or languages whose captions are read; default: all.

    Raises:
        PairtileError: no shards, no caption, or ``out`` cannot be written.
    """
    config = DataConfig(root=str(root), captions=CaptionChoice(tags=list(tags) if tags else None))
    dataset = ShardDataset(train, config=config, tokenizer=None, transform=_unused)  # type: ignore[arg-type]
    texts = list(_texts(dataset, config))
    if not texts:
        raise PairtileError(f"no caption in {root}" + (f" has a tag among {', '.join(tags)}" if tags else ""))
    return train_tokenizer(texts, vocab_size, out)


def _texts(dataset: ShardDataset, config: DataConfig) -> Iterator[str]:
    for index in range(len(dataset)):
        try:
            captions = filter_captions(dataset.sample(index).captions, config.captions)
        except BadSample:  # counted where the sample is used
            continue
        yield from (caption.text for caption in captions)


def _unused(image: object) -> None:
    raise TypeError("no image is decoded for a tokenizer")
