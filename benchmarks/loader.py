"""Contenders of the loader's rows: one epoch from shards to batches of tensors, on one core.

Everybody reads the same .tar files, decodes each image, brings it to one size, tokenises its caption by the same tokenizer, and
stacks uint8 images and int64 ids. Reading is shuffled, in each contender's own way.
"""

from __future__ import annotations

import atexit
import io
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pairtile.engine.data import DataConfig, ShardDataset, build_image_transform, build_loader, load_tokenizer
from pairtile.engine.data.tokenizer import Tokenizer, train_tokenizer

from .harness import Call, Contender
from .work import Work

BATCH = 128
CONTEXT = 32
#: Pixels on a side that an image is enlarged from: photographs are smooth, and noise is the hardest JPEG there is.
_COARSE = 16
_SHARDS = 4

#: Batches of (images, input_ids).
Batches = Iterable[tuple[Tensor, Tensor]]


@cache
def shards(samples: int, stored: int) -> Path:
    """A folder of JPEGs of `stored` pixels on a side, with captions and a tokenizer; it lives as long as the process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    generator = np.random.default_rng(0)
    captions = [
        f"photograph number {number} of a {'red' if number % 2 else 'green'} thing" for number in range(samples)
    ]
    for shard in range(_SHARDS):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for number in range(shard, samples, _SHARDS):
                _add(tar, f"{number:08d}.jpg", _photograph(generator, stored))
                _add(tar, f"{number:08d}.txt", captions[number].encode())
    train_tokenizer(captions, 300, folder)
    return folder


def _photograph(generator: np.random.Generator, stored: int) -> bytes:
    coarse = Image.fromarray(generator.integers(0, 256, (_COARSE, _COARSE, 3), dtype=np.uint8))
    written = io.BytesIO()
    coarse.resize((stored, stored), Image.Resampling.BICUBIC).save(written, "JPEG", quality=90)
    return written.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def inputs(samples: int, stored: int, side: int) -> list[Tensor]:
    """Numbers alone: what is read lies in files."""
    return [torch.tensor([samples, stored, side])]


def work(samples: int, stored: int, side: int) -> Work:
    """Pixels written once; decoding has no floor of its own."""
    return Work(0.0, samples * 3 * side * side, torch.float32, "pixels written")


def contenders() -> list[Contender]:
    return [
        Contender("pairtile", partial(epoch, ours), ours=True),
        Contender("webdataset, PIL", partial(epoch, webdataset_pil)),
        Contender("webdataset, torchvision.io", partial(epoch, webdataset_torchvision)),
    ]


def epoch(batches: Callable[[Path, int], Callable[[], Batches]], leaves: list[Tensor]) -> Call:
    """Counts, and sums that do not depend on the order: of pixels, and of token ids."""
    samples, stored, side = leaves[0].tolist()
    start = batches(shards(samples, stored), side)

    def call() -> list[Tensor]:
        rows, pixels, ids = 0, 0.0, 0
        with _one_core():
            for images, input_ids in start():
                assert images.shape[1:] == (3, side, side), images.shape
                rows += len(images)
                pixels += float(images[:, :, ::16, ::16].float().mean()) * len(images)
                ids += int(input_ids.sum())
        return [torch.tensor(float(rows)), torch.tensor(pixels / rows), torch.tensor(float(ids))]

    return call


@contextmanager
def _one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def ours(folder: Path, side: int) -> Callable[[], Batches]:
    config = DataConfig(root=str(folder), context_length=CONTEXT)
    transform = build_image_transform(config, side, train=True)
    dataset = ShardDataset(config.train, config=config, tokenizer=load_tokenizer(folder), transform=transform)

    def start() -> Batches:
        endless = build_loader(dataset, batch_size=BATCH, workers=0)
        return ((batch.images, batch.input_ids) for batch, _ in zip(endless, range(len(dataset) // BATCH)))

    return start


def webdataset_pil(folder: Path, side: int) -> Callable[[], Batches]:
    """As webdataset's own examples do it, with torchvision's transforms."""
    from torchvision.transforms import v2

    resize = v2.Compose([v2.Resize((side, side), v2.InterpolationMode.BICUBIC), v2.PILToTensor()])
    return _webdataset(folder, "pilrgb", resize)


def webdataset_torchvision(folder: Path, side: int) -> Callable[[], Batches]:
    """Tensors from the first byte: torchvision decodes, and resizes uint8."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    resize = v2.Resize((side, side), v2.InterpolationMode.BICUBIC, antialias=True)

    def decoded(data: bytes) -> Tensor:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return resize(pixels)  # type: ignore[no-any-return]

    return _webdataset(folder, None, decoded)


def _webdataset(folder: Path, decode: str | None, image: Callable[[Any], Tensor]) -> Callable[[], Batches]:
    import webdataset

    files = sorted(map(str, folder.glob("*.tar")))
    tokenizer: Tokenizer = load_tokenizer(folder)

    def start() -> Iterator[tuple[Tensor, Tensor]]:
        samples = webdataset.WebDataset(files, shardshuffle=_SHARDS, seed=0).shuffle(1000)
        samples = samples.decode(decode) if decode else samples
        for images, texts in (
            samples.to_tuple("jpg", "txt").map_tuple(image, _text).batched(BATCH, collation_fn=_columns)
        ):
            yield torch.stack(images), tokenizer.encode(texts, CONTEXT)[0]

    return start


def _text(caption: str | bytes) -> str:
    return caption.decode() if isinstance(caption, bytes) else caption


def _columns(samples: list[tuple[Tensor, str]]) -> tuple[list[Tensor], list[str]]:
    images, texts = zip(*samples)
    return list(images), list(texts)
