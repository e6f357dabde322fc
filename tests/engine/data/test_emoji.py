"""The emoji shards, made by others, are read as they are. Skipped where they are not at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pairtile.engine.data import DataConfig, ShardDataset, build_image_transform, build_loader, iterate_split

FOLDER = Path(os.environ.get("PAIRTILE_EMOJI") or Path(__file__).resolve().parents[4] / "shared" / "data" / "emoji")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no emoji shards; set PAIRTILE_EMOJI to their folder")
LANGUAGES = ["en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "ru", "uk", "ja", "ko", "zh", "hi", "vi"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return DataConfig.model_validate({"root": str(FOLDER), "context_length": 24})


def open_split(config: DataConfig, pattern: str) -> ShardDataset:
    return ShardDataset(pattern, config=config, tokenizer=None, transform=build_image_transform(config, 64, False))


def test_counts_ids_and_labels(config: DataConfig) -> None:
    train = open_split(config, config.train)
    assert (len(train), train.counts) == (4464, {})
    val = list(iterate_split(open_split(config, config.val["val"]), batch_size=100))
    ids = [int(i) for batch in val for i in batch.ids]
    assert (len(ids), len(set(ids))) == (246, 82)
    assert not any(batch.skipped for batch in val)
    assert {name for batch in val for name in batch.labels["set"]} == {"noto", "twemoji", "openmoji"}
    assert [caption.tag for caption in val[0].captions[0]] == LANGUAGES
    assert val[0].images.shape == (100, 3, 64, 64)


def test_random_languages(config: DataConfig, tokenizer) -> None:
    config.captions = {"choice": "random"}  # type: ignore[assignment]
    dataset = open_split(config, config.train)
    dataset.tokenizer = tokenizer
    batch = next(build_loader(dataset, batch_size=256))
    drawn = set()
    for row, text in enumerate(batch.captions):
        drawn |= {c.tag for c in dataset.sample(int(batch.index[row])).captions if c.text == text}
    assert drawn == set(LANGUAGES)
