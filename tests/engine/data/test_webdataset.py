"""The library webdataset reads our shards, and we read its."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pairtile.engine.data import ShardDataset, build_loader

wds = pytest.importorskip("webdataset")


def test_it_reads_ours(shards: Path) -> None:
    samples = list(wds.WebDataset(str(shards / "train-{000000..000002}.tar"), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"s{number:03d}" for number in range(50)]
    assert samples[3]["json"]["captions"][0]["text"] == "number 3"


def test_we_read_its(tmp_path: Path, png: Callable, open_split: Callable[..., ShardDataset]) -> None:
    with wds.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(8):
            name = f"längere/namen/{'x' * 120}{number}"  # beyond the 100 bytes of a plain header
            writer.write({"__key__": name, "png": png(number), "json": {"caption": f"c {number}", "id": number}})
    dataset = open_split(tmp_path)
    assert (len(dataset), dataset.counts) == (8, {})
    batch = next(build_loader(dataset, batch_size=8))
    assert batch.skipped == []
    assert sorted(batch.ids.tolist()) == list(range(8))
    assert all(key.startswith("längere/namen/x") for key in batch.keys)
