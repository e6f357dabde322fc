"""What the loader hands to the trainer and to the evaluator."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .schema import Caption, Sample

T = TypeVar("T", "Batch", "EvalBatch")


def _move(batch: T, device: torch.device | str) -> T:
    moved: dict[str, Any] = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            moved[item.name] = value.to(device, non_blocking=True)
        elif isinstance(value, dict):
            moved[item.name] = {
                name: entry.to(device, non_blocking=True) if isinstance(entry, Tensor) else entry
                for name, entry in value.items()
            }
    return replace(batch, **moved)


@dataclass
class Batch:
    """A rank's part of one global training batch. n is smaller by the samples in ``skipped``.

    Attributes:
        images: uint8 [n, C, H, W], or clips [n, T, C, H, W]; the model normalises.
        input_ids: int64 [n, L]. attention_mask: bool [n, L], False where padded.
        ids: int64 [n], equal where samples match each other. index: int64 [n], sample index in the split.
        keys, captions: the key and the chosen caption of each row.
        batch_index: counted over the whole training. epoch: of the batch, from 0.
        skipped: (key, reason) of the samples of this rank's part that could not be used.
        arrays: teacher embeddings by name, [n, ...] each; those that every row has, in one shape.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    ids: Tensor
    index: Tensor
    keys: list[str]
    captions: list[str]
    batch_index: int
    epoch: int
    skipped: list[tuple[str, str]]
    arrays: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return _move(self, device)


@dataclass
class EvalBatch:
    """Samples of a split in their own order.

    Attributes:
        images, ids, index, keys, skipped: as in `Batch`.
        ids_extra: int64 [n] by name, -1 where a sample has none.
        flags: bool [n] by name, False where a sample has none. labels: strings by name, None where it has none.
        captions: all captions of each row that have a wanted tag.
    """

    images: Tensor
    ids: Tensor
    index: Tensor
    ids_extra: dict[str, Tensor]
    flags: dict[str, Tensor]
    labels: dict[str, list[str | None]]
    keys: list[str]
    captions: list[list[Caption]]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> EvalBatch:
        """The same batch with its tensors on ``device``."""
        return _move(self, device)


def stack_arrays(samples: list[Sample]) -> dict[str, Tensor]:
    """The ``.npy`` members that all samples have in one shape and type, by name."""
    if not samples or not samples[0].arrays:
        return {}
    stacked = {}
    for name, first in samples[0].arrays.items():
        rows = [sample.arrays.get(name) for sample in samples]
        if all(row is not None and row.shape == first.shape and row.dtype == first.dtype for row in rows):
            stacked[name] = torch.stack([torch.from_numpy(row) for row in rows])
    return stacked


def names_of(dictionaries: list[dict[str, int]] | list[dict[str, bool]] | list[dict[str, str]]) -> list[str]:
    """All names in several dictionaries, in order of first appearance."""
    return list(dict.fromkeys(name for dictionary in dictionaries for name in dictionary))
