"""The loader: what it yields depends on the seed and the batch number, and on nothing else."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from pairtile.engine.data import (
    Batch,
    Reason,
    ShardDataset,
    batch_order,
    batches_per_epoch,
    build_loader,
    iterate_split,
)
from pairtile.engine.errors import PairtileError

OpenSplit = Callable[..., ShardDataset]
RANDOM = {
    "augment": [{"RandomResizedCrop": {"scale": [0.5, 1.0]}}, "RandomHorizontalFlip"],
    "captions": "random",
}


def take(dataset: ShardDataset, count: int, **arguments: int) -> list[Batch]:
    return list(itertools.islice(build_loader(dataset, batch_size=8, **arguments), count))


def joined(parts: list[Batch]) -> tuple[object, ...]:
    return (
        torch.cat([part.images for part in parts]).numpy().tobytes(),
        torch.cat([part.input_ids for part in parts]).tolist(),
        torch.cat([part.index for part in parts]).tolist(),
        [key for part in parts for key in part.keys],
        [caption for part in parts for caption in part.captions],
    )


def same(one: list[Batch], other: list[Batch]) -> bool:
    return [joined([b]) for b in one] == [joined([b]) for b in other]


@pytest.mark.parametrize("fields", [{}, RANDOM], ids=["plain", "random"])
def test_ranks_and_workers_do_not_change_the_data(shards: Path, open_split: OpenSplit, fields: dict) -> None:
    whole = take(open_split(shards, **fields), 14)  # two epochs of 6 batches and a bit
    for world_size, workers in ((2, 0), (4, 0), (1, 2), (2, 2)):
        ranks = [
            take(open_split(shards, **fields), 14, rank=rank, world_size=world_size, workers=workers)
            for rank in range(world_size)
        ]
        for batch, parts in zip(whole, zip(*ranks)):
            assert joined([batch]) == joined(list(parts))
            assert all(len(part) == 8 // world_size for part in parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_tail(shards: Path, open_split: OpenSplit, workers: int) -> None:
    whole = take(open_split(shards, **RANDOM), 14)
    tail = take(open_split(shards, **RANDOM), 5, start_batch=9, workers=workers)
    assert same(whole[9:], tail)
    assert [batch.batch_index for batch in tail] == [9, 10, 11, 12, 13]
    assert [batch.epoch for batch in tail] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("fields", [{}, RANDOM], ids=["plain", "random"])
def test_cache_changes_nothing(shards: Path, open_split: OpenSplit, fields: dict) -> None:
    plain = take(open_split(shards, **fields), 14)
    cached = open_split(shards, cache_mb=1, **fields)
    assert same(plain, take(cached, 14))
    assert cached._cache


def test_an_epoch_has_every_sample_at_most_once(shards: Path, open_split: OpenSplit) -> None:
    dataset = open_split(shards)
    batches = take(dataset, batches_per_epoch(dataset, 8))
    seen = [int(i) for batch in batches for i in batch.index]
    assert len(seen) == len(set(seen)) == 48
    assert seen == batch_order(50, 8, dataset.seed, 0).flatten().tolist()
    for batch in batches:
        assert batch.keys == [f"s{i:03d}" for i in batch.index]
        assert batch.ids.tolist() == [i // 2 for i in batch.index.tolist()]


def test_the_global_generator_is_left_alone(shards: Path, open_split: OpenSplit) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(open_split(shards, **RANDOM), 2)
    take(open_split(shards, **RANDOM), 2, workers=1)
    assert torch.equal(before, torch.get_rng_state())


def test_epochs_differ_in_augmentation_and_captions(shards: Path, open_split: OpenSplit) -> None:
    dataset = open_split(shards, **RANDOM)
    rows = np.arange(8)
    one, two = (dataset.batch(rows, epoch=epoch, batch_index=0) for epoch in (0, 1))
    assert not torch.equal(one.images, two.images)
    assert one.captions != two.captions


def test_an_augmentation_that_fails_is_counted(shards: Path, open_split: OpenSplit) -> None:
    dataset = open_split(shards)
    dataset.transform = torchvision.transforms.v2.RandomCrop(9)
    dataset._random_image = True
    batch = take(dataset, 1)[0]
    assert {reason for _, reason in batch.skipped} == {Reason.AUGMENTATION_FAILED}


def test_teacher_embeddings_are_stacked(
    tmp_path: Path, open_split: OpenSplit, png: Callable, write_tar: Callable
) -> None:
    members = []
    for number in range(4):
        data = io.BytesIO()
        np.save(data, np.full(3, number, dtype=np.float32))
        members += [(f"{number}.png", png(number)), (f"{number}.txt", b"text"), (f"{number}.vit.npy", data.getvalue())]
    write_tar(tmp_path / "train-0.tar", members)
    batch = next(build_loader(open_split(tmp_path), batch_size=4))
    assert batch.arrays["vit"].tolist() == [[i] * 3 for i in batch.index.tolist()]


def test_batch_types(shards: Path, open_split: OpenSplit) -> None:
    batch = take(open_split(shards), 1)[0].to("cpu")
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (8, 3, 8, 8)
    assert batch.input_ids.dtype == batch.ids.dtype == batch.index.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool
    assert batch.input_ids.shape == batch.attention_mask.shape == (8, 8)
    assert batch.captions == [f"number {i}" for i in batch.index]
    assert batch.skipped == []


def test_batch_size_errors(shards: Path, open_split: OpenSplit) -> None:
    dataset = open_split(shards)
    with pytest.raises(PairtileError, match=r"8 cannot be divided by the 3 ranks"):
        build_loader(dataset, batch_size=8, world_size=3)
    with pytest.raises(PairtileError, match=r"50 samples, fewer than one batch of 64"):
        build_loader(dataset, batch_size=64)


def test_a_dataset_can_be_sent_to_a_fresh_process(shards: Path, open_split: OpenSplit) -> None:
    dataset = open_split(shards, cache_mb=1, **RANDOM)
    batch = take(dataset, 1)
    assert same(batch, take(pickle.loads(pickle.dumps(dataset)), 1))


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_reads_all_in_order(shards: Path, open_split: OpenSplit, world_size: int) -> None:
    dataset = open_split(shards, train=False, captions={"tags": ["de", "en"]})
    ranks = [list(iterate_split(dataset, batch_size=16, rank=r, world_size=world_size)) for r in range(world_size)]
    assert {len(rank) for rank in ranks} == {4}
    parts = [part for step in zip(*ranks) for part in step]
    assert torch.cat([part.index for part in parts]).tolist() == list(range(50))
    first = parts[0]
    assert [caption.text for caption in first.captions[0]] == ["nummer 0", "number 0", "cipher 0"]
    assert first.ids_extra["third"].tolist() == [i // 3 for i in first.index.tolist()]
    assert first.flags["even"].tolist() == [i % 2 == 0 for i in first.index.tolist()]
    assert set(first.labels["colour"]) == {"noise"}


def test_evaluation_through_workers_is_the_same(shards: Path, open_split: OpenSplit) -> None:
    dataset = open_split(shards, train=False)
    for one, two in zip(iterate_split(dataset, batch_size=16), iterate_split(dataset, batch_size=16, workers=2)):
        assert torch.equal(one.images, two.images)
        assert one.keys == two.keys
