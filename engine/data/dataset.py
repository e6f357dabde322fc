"""Random access to the samples of a split, decoded, and their assembly into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .arrays import parse_array
from .batch import Batch, EvalBatch, names_of, stack_arrays
from .captions import choose_caption, filter_captions
from .config import DataConfig
from .images import convert_image, decode_clip, decode_image
from .order import AUGMENT_STREAM, CAPTION_STREAM, sample_seeds
from .schema import BadSample, Reason, Sample, parse_sample
from .shard_index import IMAGE, RECORD, TEXT
from .shards import ShardSet, expand_shards
from .tokenizer import Tokenizer

# What a cached sample weighs beside its pixels: Python objects for keys, captions and dictionaries.
_SAMPLE_BYTES = 1500
_CAPTION_BYTES = 160


class ShardDataset:
    """A split: shards, and how their samples become rows of a batch.

    Args:
        shards: patterns or paths, relative to ``config.root`` (see `expand_shards`).
        config: the recipe's ``data:`` block.
        tokenizer: turns captions into ids; None where only `sample` and `eval_batch` are used.
        transform: PIL image -> uint8 [C, H, W], or frames of a clip -> [T, C, H, W], from `build_image_transform`.
        seed: with the epoch, decides order, caption choice and augmentation.

    Attributes:
        paths: the shards in order. counts: members that no sample uses, by reason ("truncated tar", ...).
        examples: the first ("shard:member", reason) of them.

    Raises:
        PairtileError: missing folder, no shard matches, a shard cannot be opened.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        config: DataConfig,
        tokenizer: Tokenizer | None,
        transform: Callable[[Any], Tensor],
        seed: int = 0,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.transform = transform
        self.seed = seed
        self.shards = ShardSet(expand_shards(shards, config.root))
        self.paths = self.shards.paths
        self.counts = self.shards.counts
        self.examples = self.shards.examples
        self._random_image = getattr(transform, "random", True)
        self._cache: dict[int, tuple[Sample, Image.Image | list[Image.Image] | Tensor]] = {}
        self._cache_room = config.cache_mb << 20

    def __len__(self) -> int:
        return len(self.shards)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_cache_room": self.config.cache_mb << 20}

    def key(self, index: int) -> str:
        """The key of a sample, without reading it."""
        return self.shards.key(index)

    def sample(self, index: int) -> Sample:
        """Sample number ``index`` with its encoded image and all of its captions.

        Raises:
            BadSample: a member is missing or cannot be read or parsed.
        """
        shard, members, arrays = self.shards.locate(index)
        places = members.tolist()

        def read(offset: int, size: int) -> bytes:
            try:
                data = self.shards.read(shard, offset, size)
            except OSError as error:
                raise BadSample(Reason.UNREADABLE, str(error)) from None
            if len(data) < size:
                raise BadSample(Reason.TRUNCATED_TAR)
            return data

        def member(column: int) -> bytes | None:
            return read(places[column], places[column + 1]) if places[column + 1] >= 0 else None

        image = member(IMAGE)
        if image is None:
            raise BadSample(Reason.MISSING_MEMBER, "no image")
        tensors = {name: parse_array(read(offset, size)) for name, offset, size in arrays}
        return parse_sample(self.key(index), index, image, member(RECORD), member(TEXT), tensors)

    def _decode(self, data: bytes) -> Image.Image | list[Image.Image]:
        limits = {"max_pixels": self.config.max_pixels, "max_side": self.config.max_side}
        frames = self.config.frames
        return decode_image(data, **limits) if frames is None else decode_clip(data, frames, **limits)

    def _load(self, index: int) -> tuple[Sample, Image.Image | list[Image.Image] | Tensor]:
        """The sample with its wanted captions and without its encoded bytes, and the picture: a tensor when
        the transform always gives the same one, else the decoded image, or the frames of a clip."""
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        sample = self.sample(index)
        sample.captions = filter_captions(sample.captions, self.config.captions)
        decoded = self._decode(sample.image)
        sample.image = b""
        picture: Image.Image | list[Image.Image] | Tensor
        if not self._random_image:
            picture = self.transform(decoded)
            pixels = picture.nbytes
        elif isinstance(decoded, Image.Image):
            picture = convert_image(decoded, self.config.image_mode)
            pixels = _bytes_of(picture)
        else:
            picture = [convert_image(frame, self.config.image_mode) for frame in decoded]
            pixels = sum(map(_bytes_of, picture))
        if self._cache_room > 0:
            extra = sum(array.nbytes for array in sample.arrays.values())
            self._cache_room -= pixels + extra + _SAMPLE_BYTES + _CAPTION_BYTES * len(sample.captions)
            if self._cache_room >= 0:
                self._cache[index] = sample, picture
        return sample, picture

    def _augment(self, image: Image.Image | list[Image.Image]) -> Tensor:
        try:
            return self.transform(image)
        except (ValueError, RuntimeError, TypeError) as error:  # for example a crop larger than the image
            raise BadSample(Reason.AUGMENTATION_FAILED, str(error)) from None

    def _gather(
        self, indices: NDArray[np.int64], image_seeds: list[int] | None
    ) -> tuple[list[Sample], Tensor, list[int], list[tuple[str, str]]]:
        """(samples, images uint8 [n, C, H, W] or clips [n, T, C, H, W], positions in ``indices`` that were good, skipped)."""
        samples: list[Sample] = []
        images: list[Tensor] = []
        good: list[int] = []
        skipped: list[tuple[str, str]] = []
        for position, index in enumerate(indices.tolist()):
            try:
                sample, picture = self._load(index)
                if not isinstance(picture, Tensor):
                    if image_seeds is not None:
                        torch.default_generator.manual_seed(image_seeds[position])
                    picture = self._augment(picture)
            except BadSample as bad:
                skipped.append((self.key(index), bad.reason))
                continue
            samples.append(sample)
            images.append(picture)
            good.append(position)
        shape = getattr(self.transform, "shape", (0, 0, 0))
        stacked = torch.stack(images) if images else torch.empty((0, *shape), dtype=torch.uint8)
        return samples, stacked, good, skipped

    def batch(self, indices: NDArray[np.int64], *, epoch: int, batch_index: int) -> Batch:
        """The training batch of some samples: a function of the seed, the epoch and the indices alone."""
        if self.tokenizer is None:
            raise TypeError("a ShardDataset without a tokenizer cannot make training batches")
        choice = self.config.captions
        if self._random_image:
            # torchvision draws from torch's own CPU generator; the caller's state is put back.
            seeds = (sample_seeds(self.seed, epoch, indices, AUGMENT_STREAM) >> np.uint64(1)).tolist()
            state = torch.default_generator.get_state()
            try:
                samples, images, good, skipped = self._gather(indices, seeds)
            finally:
                torch.default_generator.set_state(state)
        else:
            samples, images, good, skipped = self._gather(indices, None)
        if choice.choice == "first":
            texts = [sample.captions[0].text for sample in samples]
        else:
            draws = sample_seeds(self.seed, epoch, indices[good], CAPTION_STREAM).tolist()
            texts = [choose_caption(sample.captions, choice, draw).text for sample, draw in zip(samples, draws)]
        input_ids, mask = self.tokenizer.encode(texts, self.config.context_length, self.config.pad_to)
        return Batch(
            images=images,
            input_ids=input_ids,
            attention_mask=mask,
            ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
            index=torch.from_numpy(indices[good].astype(np.int64)),
            keys=[sample.key for sample in samples],
            captions=texts,
            arrays=stack_arrays(samples),
            batch_index=batch_index,
            epoch=epoch,
            skipped=skipped,
        )

    def eval_batch(self, indices: NDArray[np.int64]) -> EvalBatch:
        """Some samples with all their wanted captions, ids, flags and labels."""
        samples, images, good, skipped = self._gather(indices, None)
        ids = [sample.ids for sample in samples]
        flags = [sample.flags for sample in samples]
        labels = [sample.labels for sample in samples]
        return EvalBatch(
            images=images,
            ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
            index=torch.from_numpy(indices[good].astype(np.int64)),
            ids_extra={name: torch.tensor([row.get(name, -1) for row in ids]) for name in names_of(ids)},
            flags={name: torch.tensor([row.get(name, False) for row in flags]) for name in names_of(flags)},
            labels={name: [row.get(name) for row in labels] for name in names_of(labels)},
            keys=[sample.key for sample in samples],
            captions=[sample.captions for sample in samples],
            skipped=skipped,
        )


def _bytes_of(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())
