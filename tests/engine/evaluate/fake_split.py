"""A model, a tokenizer and a split small enough to evaluate in milliseconds; run as a script, one rank of several."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pairtile.engine.evaluate import ClassificationConfig, SplitResult, embed, evaluate_split, sheet_rows

CLASSES = ClassificationConfig(
    label="kind", classes={"round": "round", "flat": ["flat", "level"], "long": "long"}, templates=["a {} thing", "{}"]
)


class FakeModel(nn.Module):
    """Linear towers. Counts its forwards, as ZeRO-3 would be sensitive to them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image_weight = nn.Parameter(torch.randn(48, 16, generator=generator))
        self.text_weight = nn.Parameter(torch.randn(64, 16, generator=generator))
        self.patch_weight = nn.Parameter(torch.randn(12, 8, generator=generator))
        self.word_weight = nn.Parameter(torch.randn(64, 8, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.image_forwards = self.text_forwards = 0

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        self.image_forwards += 1
        features = self.dropout(images.flatten(1).float() / 255 - 0.5) @ self.image_weight
        return nn.functional.normalize(features, dim=1) if normalize else features

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor, normalize: bool = True) -> Tensor:
        self.text_forwards += 1
        counts = torch.zeros(len(input_ids), 64).scatter_add_(1, input_ids, attention_mask.float())
        features = self.dropout(counts) @ self.text_weight
        return nn.functional.normalize(features, dim=1) if normalize else features

    def embed_image(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Four patches an image: its rows of pixels."""
        patches = (images.transpose(1, 2).flatten(2).float() / 255 - 0.5) @ self.patch_weight
        mask = torch.ones(patches.shape[:2], dtype=torch.bool)
        return self.encode_image(images), (nn.functional.normalize(patches, dim=2), mask)

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A word a character. NaN where there is none: whatever is there must have no effect."""
        words = nn.functional.normalize(self.word_weight[input_ids], dim=2)
        words = words.masked_fill(~attention_mask.unsqueeze(2), torch.nan)
        return self.encode_text(input_ids, attention_mask), (words, attention_mask)


class FakeTokenizer:
    def encode(self, texts: list[str], context_length: int) -> tuple[Tensor, Tensor]:
        codes = torch.zeros(len(texts), context_length, dtype=torch.int64)
        mask = torch.zeros(len(texts), context_length, dtype=torch.bool)
        for row, text in enumerate(texts):
            tokens = [ord(character) % 64 for character in text][:context_length]
            codes[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = True
        return codes, mask


class FakeSplit:
    """``count`` readable samples of 3 x 4 x 4 pixels; every seventh index cannot be read."""

    def __init__(self, count: int = 43) -> None:
        self.tokenizer = FakeTokenizer()
        self.config = SimpleNamespace(context_length=12)
        self.count = count

    def sample(self, index: int) -> dict[str, Any]:
        number = index // 2  # two images per id
        generator = torch.Generator().manual_seed(index % 3 if index % 5 == 0 else 100 + index)
        texts = [f"thing {number}", f"thing {number}", f"{number} seen"][: index % 4]  # none, one, twice the same, two
        return {
            "image": torch.randint(0, 256, (3, 4, 4), generator=generator, dtype=torch.uint8),
            "id": 1000 - number,
            "drawing": index % 3 if index % 5 == 0 else -1,  # equal seeds above: equal drawings
            "flag": index % 3 == 0,
            "kind": None if index % 10 == 9 else ("round", "flat", "long")[index % 3],
            "texts": [SimpleNamespace(text=text, tag=None) for text in [*texts, *(["shared"] if number < 2 else [])]],
        }

    def iterate(self, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[SimpleNamespace]:
        batch_size //= world_size
        mine = list(range(rank, self.count, world_size))
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            skipped = [(f"key{index}", "undecodable image") for index in indices if index % 7 == 6]
            indices = [index for index in indices if index % 7 != 6]
            samples = [self.sample(index) for index in indices]
            images = [sample["image"] for sample in samples]
            yield SimpleNamespace(
                images=torch.stack(images) if images else torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
                index=torch.tensor(indices, dtype=torch.int64),
                ids=torch.tensor([sample["id"] for sample in samples], dtype=torch.int64),
                ids_extra={"drawing": torch.tensor([sample["drawing"] for sample in samples], dtype=torch.int64)},
                flags={"drawing_in_train": torch.tensor([sample["flag"] for sample in samples], dtype=torch.bool)},
                labels={"kind": [sample["kind"] for sample in samples]},
                keys=[f"key{index}" for index in indices],
                captions=[sample["texts"] for sample in samples],
                skipped=skipped,
            )


def iterate_fake(dataset: FakeSplit, **arguments: int) -> Iterator[SimpleNamespace]:
    """Stands in for ``pairtile.engine.data.iterate_split``."""
    return dataset.iterate(**arguments)


def evaluate_fake(model: FakeModel, count: int, **arguments: Any) -> SplitResult:
    return evaluate_split(
        model, FakeSplit(count), split="val", batch_size=4, device="cpu", classification=CLASSES, **arguments
    )


def main(rank: int, world_size: int, folder: Path, counts: list[int]) -> None:
    """One rank: evaluates splits of some sizes, writes its results and the number of its forwards."""
    embed.iterate_split = sheet_rows.iterate_split = iterate_fake
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    for count in counts:
        model = FakeModel()
        result = evaluate_fake(model, count, rank=rank, world_size=world_size, contact_sheet=folder / f"{count}.png")
        (folder / f"{count}-result{rank}.json").write_text(result.model_dump_json())
        (folder / f"{count}-forwards{rank}").write_text(f"{model.image_forwards} {model.text_forwards}")
        late = evaluate_fake(model, count, rank=rank, world_size=world_size, scores="rerank", rerank_top=9)
        (folder / f"{count}-late{rank}.json").write_text(late.model_dump_json())
    dist.barrier()
    # gloo's threads can abort an orderly interpreter exit.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), [int(count) for count in sys.argv[4:]])
