"""Iterators over a split: endless global batches for training, one pass in order for evaluation."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import PairtileError
from .batch import Batch, EvalBatch
from .dataset import ShardDataset
from .order import batch_indices, rank_slice

AnyBatch = TypeVar("AnyBatch", Batch, EvalBatch)

# Below this many samples a pass is over before worker processes have started.
_MIN_SAMPLES_FOR_EVAL_WORKERS = 20_000


def batches_per_epoch(dataset: ShardDataset, batch_size: int) -> int:
    """Whole global batches in one epoch.

    Raises:
        PairtileError: the split has fewer samples than one batch.
    """
    if batch_size < 1:
        raise PairtileError(f"batch_size must be at least 1, got {batch_size}")
    if len(dataset) < batch_size:
        raise PairtileError(
            f"the training split has {len(dataset)} samples, fewer than one batch of {batch_size}; "
            "lower the batch size or add shards"
        )
    return len(dataset) // batch_size


def check_ranks(batch_size: int, rank: int, world_size: int) -> None:
    """Raises PairtileError unless every rank gets the same whole number of rows of a global batch."""
    if not 0 <= rank < world_size:
        raise PairtileError(f"rank must be between 0 and world_size - 1, got rank {rank} of {world_size}")
    if batch_size % world_size:
        raise PairtileError(
            f"the global batch size {batch_size} cannot be divided by the {world_size} ranks; "
            f"choose a multiple of {world_size} or another number of ranks"
        )


class _TrainBatches(Dataset[Batch]):
    """Batch number -> this rank's part of it."""

    def __init__(self, dataset: ShardDataset, batch_size: int, rank: int, world_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.rows = rank_slice(batch_size, rank, world_size)

    def __getitem__(self, batch_index: int) -> Batch:
        epoch, indices = batch_indices(len(self.dataset), self.batch_size, self.dataset.seed, batch_index)
        return self.dataset.batch(indices[self.rows], epoch=epoch, batch_index=batch_index)


class _EvalBatches(Dataset[EvalBatch]):
    def __init__(self, dataset: ShardDataset, batch_size: int, rank: int, world_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __getitem__(self, batch_index: int) -> EvalBatch:
        start = batch_index * self.batch_size
        indices = np.arange(start, min(start + self.batch_size, len(self.dataset)))
        return self.dataset.eval_batch(indices[rank_slice(len(indices), self.rank, self.world_size)])


class _CountFrom:
    """A sampler that never ends."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _start_worker(_: int) -> None:
    # One thread each: the workers are the parallelism. Tokenizers would refuse threads after a fork anyway.
    torch.set_num_threads(1)
    # Whoever stops a run signals the whole group; the trainer decides when its workers end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _same(batch: Any) -> Any:
    return batch


def _through_workers(batches: Dataset[AnyBatch], order: Iterable[int], workers: int) -> Iterator[AnyBatch]:
    """The batches in the order of ``order``, made by ``workers`` processes in turn."""
    # fork shares the index and starts at once; with a live CUDA context a fresh process is the safe one.
    fork = sys.platform.startswith("linux") and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        collate_fn=_same,
        num_workers=workers,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if fork else "spawn",
        prefetch_factor=2,
        # The loader draws a base seed for its workers, which need none: not from the caller's generator.
        generator=torch.Generator(),
    )
    return iter(loader)


def build_loader(
    dataset: ShardDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Endless training batches of one rank, from global batch ``start_batch`` on.

    Global batch b is a fixed list of ``batch_size`` samples, a function of (dataset.seed, b, batch_size); rank r
    of W gets rows r * batch_size / W up to (r + 1) * batch_size / W of it. So neither W nor ``workers``
    nor the start changes what is read. The samples left over at the end of an epoch are dropped; they are others
    in each epoch. ``workers`` defaults to ``dataset.config.workers``; processes end with the iterator.

    Raises:
        PairtileError: fewer samples than one batch; a batch size that the world size does not divide.
    """
    check_ranks(batch_size, rank, world_size)
    batches_per_epoch(dataset, batch_size)
    batches = _TrainBatches(dataset, batch_size, rank, world_size)
    workers = dataset.config.workers if workers is None else workers
    if workers == 0:
        return map(batches.__getitem__, itertools.count(start_batch))
    return _through_workers(batches, _CountFrom(start_batch), workers)


def iterate_split(
    dataset: ShardDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
) -> Iterator[EvalBatch]:
    """One pass over a split by sample index; nothing is dropped.

    ``batch_size`` counts the samples of all ranks together. Every rank gets the same number of batches (so
    collectives stay in step), the last of which may be empty on some. ``workers`` defaults to
    ``dataset.config.workers`` for splits of 20,000 samples and more, and to 0 for smaller ones.

    Raises:
        PairtileError: a rank outside the world, or a batch size below 1.
    """
    check_ranks(world_size, rank, world_size)
    if batch_size < 1:
        raise PairtileError(f"batch_size must be at least 1, got {batch_size}")
    batches = _EvalBatches(dataset, batch_size, rank, world_size)
    if workers is None:
        workers = dataset.config.workers if len(dataset) >= _MIN_SAMPLES_FOR_EVAL_WORKERS else 0
    if workers == 0:
        return map(batches.__getitem__, range(len(batches)))
    return _through_workers(batches, range(len(batches)), workers)
