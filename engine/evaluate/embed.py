"""Embeds a split: every image once, every distinct caption text once, on one rank or on many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import iterate_split
from ..errors import PairtileError
from .gather import Ranks
from .packed import PackedTokens
from .scorers import Side


@dataclass(frozen=True)
class SplitEmbeddings:
    """A split in embedding space, in the order of the sample index, the same on every rank. All tensors on the CPU.

    N images, M captions. A caption is a distinct (text, id) pair: the same text on several images of one id is one
    candidate and one query, so it is counted once. ``owner_text[p]`` describes ``owner_image[p]``.
    """

    image_features: Tensor  # float32 [N, D]
    text_features: Tensor  # float32 [M, D]
    index: Tensor  # int64 [N]
    image_ids: Tensor  # int64 [N]
    ids_extra: dict[str, Tensor]  # int64 [N] each, -1 where missing
    flags: dict[str, Tensor]  # bool [N] each
    labels: dict[str, list[str | None]]
    keys: list[str]
    texts: list[str]
    text_ids: Tensor  # int64 [M]
    owner_text: Tensor  # int64 [P]
    owner_image: Tensor  # int64 [P]
    skipped: list[tuple[str, str]]  # (key, reason)
    image_tokens: PackedTokens | None = None  # of the N images; None without late interaction
    text_tokens: PackedTokens | None = None  # of the M captions

    @property
    def images(self) -> Side:
        return Side(self.image_features, self.image_tokens)

    @property
    def captions(self) -> Side:
        return Side(self.text_features, self.text_tokens)

    def ambiguous_captions(self) -> int:
        """How many captions have a text that is also the caption of another id."""
        ids_of_text: dict[str, int] = {}
        for text in self.texts:
            ids_of_text[text] = ids_of_text.get(text, 0) + 1
        return sum(count for count in ids_of_text.values() if count > 1)


class Encoder:
    """A model as evaluation uses it: without gradient, under autocast, in batches that all ranks run together.

    Under ZeRO-3 a forward is collective, so each rank must run the same number of them: a rank that has nothing
    left runs a batch whose result is dropped.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        context_length: int,
        ranks: Ranks,
        *,
        batch_size: int,
        autocast: torch.dtype | None,
        tokens: bool = False,
    ) -> None:
        # A DeepSpeed or DDP wrapper hides the methods behind `.module`.
        self.model = model if hasattr(model, "encode_image") else model.module
        self.tokens = tokens
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.ranks = ranks
        self.batch_size = batch_size
        self.autocast = autocast

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.ranks.device.type, self.autocast) if self.autocast is not None else nullcontext()

    @torch.no_grad()
    def images(self, images: Tensor, count: int) -> Side:
        """The first ``count`` of the images uint8 [n, C, H, W], in float32 on the CPU."""
        images = images.to(self.ranks.device)
        with self.precision():
            if self.tokens:
                pooled, tokens = self.model.embed_image(images)
            else:
                pooled, tokens = self.model.encode_image(images, normalize=True), None
        return _side(pooled, tokens, count)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Side:
        """T texts, in float32 on the CPU; each rank embeds a slice, all ranks get all. Collective."""
        share = -(-len(texts) // self.ranks.world_size)
        mine = texts[self.ranks.rank * share :][:share]
        parts: list[Side] = []
        for start in range(0, share, self.batch_size):
            batch = mine[start : start + self.batch_size]
            encoded = self.tokenizer.encode(batch or texts[:1], self.context_length)
            input_ids, attention_mask = (each.to(self.ranks.device) for each in encoded)
            with self.precision():
                if self.tokens:
                    pooled, tokens = self.model.embed_text(input_ids, attention_mask)
                else:
                    pooled, tokens = self.model.encode_text(input_ids, attention_mask, normalize=True), None
            parts.append(_side(pooled, tokens, len(batch)))
        return self.gathered(parts)

    def gathered(self, parts: list[Side]) -> Side:
        """The parts of this rank in their order, behind those of the ranks before it. Collective."""
        pooled = self.ranks.gather_rows(torch.cat([part.pooled for part in parts]) if parts else torch.zeros(0, 0))
        if not self.tokens:
            return Side(pooled)
        mine = [part.tokens for part in parts if part.tokens is not None]
        rows = torch.cat([tokens.rows for tokens in mine]) if mine else torch.zeros(0, 0)
        lengths = torch.cat([tokens.lengths for tokens in mine]) if mine else torch.zeros(0, dtype=torch.int64)
        rows, lengths = self.ranks.gather_rows(rows), self.ranks.gather_rows(lengths.unsqueeze(1)).squeeze(1)
        return Side(pooled, PackedTokens.of_lengths(rows, lengths))


def _side(pooled: Tensor, tokens: tuple[Tensor, Tensor] | None, count: int) -> Side:
    """The first ``count`` rows of what a model gave: (pooled [n, D], (tokens [n, L, d], mask bool [n, L]) or None)."""
    packed = None if tokens is None else PackedTokens.of_padded(tokens[0][:count], tokens[1][:count])
    if packed is not None:
        packed = PackedTokens(_unit(packed.rows), packed.cu_seqlens).to("cpu")
    return Side(_unit(pooled[:count]).cpu(), packed)


def _unit(features: Tensor) -> Tensor:
    """Normalised once more, in float32: a vector normalised in 16 bits has a length off by up to 1e-3."""
    return F.normalize(features.float(), dim=1)


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Puts every module into eval mode and each back into its own mode (a frozen tower stays in eval mode)."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode


def make_encoder(
    model: Any,
    dataset: Any,
    *,
    batch_size: int,
    device: torch.device | str,
    group: dist.ProcessGroup | None = None,
    rank: int = 0,
    world_size: int = 1,
    autocast: torch.dtype | None = None,
    tokens: bool = False,
) -> Encoder:
    """The encoder for a model and the tokenizer of a data set; with ``tokens`` it gives token embeddings too."""
    ranks = Ranks(rank, world_size, group, torch.device(device))
    return Encoder(
        model,
        dataset.tokenizer,
        dataset.config.context_length,
        ranks,
        batch_size=batch_size,
        autocast=autocast,
        tokens=tokens,
    )


def embed_split(
    encoder: Encoder, dataset: Any, *, split: str = "split", progress: Callable[[int], None] | None = None
) -> SplitEmbeddings:
    """Embeds a split. Collective: every rank of ``encoder.ranks`` calls it, and every rank gets the whole result.

    Args:
        encoder: from :func:`make_encoder`.
        dataset: what :func:`pairtile.engine.data.iterate_split` takes.
        split: its name, for messages.
        progress: called with the number of images of each batch that this rank has embedded.

    Raises:
        PairtileError: no sample of the split could be read.
    """
    with evaluation_mode(encoder.model):
        mine, metadata = _embed_images(encoder, dataset, progress)
        images = encoder.gathered(mine)
        parts = encoder.ranks.gather_json(metadata)
        samples = [sample for part in parts for sample in part["samples"]]
        skipped = [(key, reason) for part in parts for key, reason in part["skipped"]]
        if not samples:
            reasons = ", ".join(sorted({reason for _, reason in skipped})) or "it is empty"
            raise PairtileError(
                f"nothing to evaluate: no sample of '{split}' could be read ({reasons}); check the data"
            )
        return _assemble(encoder, images, samples, skipped)


def _embed_images(
    encoder: Encoder, dataset: Any, progress: Callable[[int], None] | None
) -> tuple[list[Side], dict[str, list[Any]]]:
    """This rank's part, a batch at a time, and its metadata as plain values."""
    ranks = encoder.ranks
    # The loader counts a batch over all ranks, the encoder on one.
    total = encoder.batch_size * ranks.world_size
    batches = iter(iterate_split(dataset, batch_size=total, rank=ranks.rank, world_size=ranks.world_size))
    parts: list[Side] = []
    samples: list[dict[str, Any]] = []
    skipped: list[tuple[str, str]] = []
    while True:
        batch = next(batches, None)
        rows = 0 if batch is None else len(batch.images)
        # as many numbers on every rank, one without samples too: [0, C, H, W] of images, [T, C, H, W] of clips
        shape = list(batch.images.shape[1:]) if batch is not None and rows else []
        going, *shape = ranks.maximum([batch is not None, *[0] * (4 - len(shape)), *shape])
        if not going:
            break
        if batch is not None:
            samples += _plain_samples(batch)
            skipped += [(str(key), str(reason)) for key, reason in batch.skipped]
        if any(shape):
            shape = shape if shape[0] else shape[1:]
            images = batch.images if batch is not None and rows else torch.zeros(1, *shape, dtype=torch.uint8)
            parts.append(encoder.images(images, rows))
        if progress is not None:
            progress(rows)
    return parts, {"samples": samples, "skipped": skipped}


def _plain_samples(batch: Any) -> list[dict[str, Any]]:
    """The metadata of a batch, one dict of JSON values per sample."""
    index, ids = batch.index.tolist(), batch.ids.tolist()
    extra = {name: values.tolist() for name, values in batch.ids_extra.items()}
    flags = {name: values.tolist() for name, values in batch.flags.items()}
    return [
        {
            "index": index[row],
            "id": ids[row],
            "key": batch.keys[row],
            "extra": {name: values[row] for name, values in extra.items()},
            "flags": {name: bool(values[row]) for name, values in flags.items()},
            "labels": {name: values[row] for name, values in batch.labels.items()},
            "texts": [caption.text for caption in batch.captions[row]],
        }
        for row in range(len(index))
    ]


def _assemble(
    encoder: Encoder, images: Side, samples: list[dict[str, Any]], skipped: list[tuple[str, str]]
) -> SplitEmbeddings:
    """Sorts by sample index, drops a sample that two ranks delivered, and embeds the distinct texts."""
    position = {sample["index"]: row for row, sample in reversed(list(enumerate(samples)))}
    order = [position[index] for index in sorted(position)]
    samples = [samples[row] for row in order]

    captions: dict[tuple[str, int], int] = {}
    owners: dict[tuple[int, int], None] = {}
    for image, sample in enumerate(samples):
        for text in sample["texts"]:
            caption = captions.setdefault((text, sample["id"]), len(captions))
            owners[(caption, image)] = None
    distinct = {text: row for row, text in enumerate(dict.fromkeys(text for text, _ in captions))}
    # Of a split without captions: no rows of the images' widths.
    nothing = torch.zeros(0, dtype=torch.int64)
    texts = encoder.texts(list(distinct)) if captions else images.select(nothing)
    images = images.select(torch.tensor(order))
    texts = texts.select(torch.tensor([distinct[text] for text, _ in captions], dtype=torch.int64))
    pairs = torch.tensor(list(owners), dtype=torch.int64).reshape(-1, 2)

    def names(field: str) -> list[str]:
        return sorted({name for sample in samples for name in sample[field]})

    def column(field: str, name: str, missing: int | bool) -> Tensor:
        return torch.tensor([sample[field].get(name, missing) for sample in samples])

    return SplitEmbeddings(
        image_features=images.pooled,
        text_features=texts.pooled,
        index=torch.tensor([sample["index"] for sample in samples]),
        image_ids=torch.tensor([sample["id"] for sample in samples]),
        ids_extra={name: column("extra", name, -1) for name in names("extra")},
        flags={name: column("flags", name, False) for name in names("flags")},
        labels={name: [sample["labels"].get(name) for sample in samples] for name in names("labels")},
        keys=[sample["key"] for sample in samples],
        texts=[text for text, _ in captions],
        text_ids=torch.tensor([text_id for _, text_id in captions], dtype=torch.int64),
        owner_text=pairs[:, 0].contiguous(),
        owner_image=pairs[:, 1].contiguous(),
        skipped=skipped,
        image_tokens=images.tokens,
        text_tokens=texts.tokens,
    )
