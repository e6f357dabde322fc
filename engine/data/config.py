"""The ``data:`` block of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..strict import StrictModel

# Pillow's own threshold for a decompression bomb (a quarter of a gigabyte of RGB), and a side that a thin
# image cannot exceed either: resizing filters are built per side, and file formats' own limits are near.
MAX_PIXELS = 89_478_485
MAX_SIDE = 16_384


class CaptionChoice(StrictModel):
    """Which of a sample's captions a training step reads.

    first: the first one; with ``tags``, the first of the first listed tag that the sample has.
    random: each with the same chance. weighted: a tag drawn by its weight among those that the sample has,
    then each of its captions with the same chance.
    """

    choice: Literal["first", "random", "weighted"] = "first"
    tags: list[str] | dict[str, float] | None = None

    @model_validator(mode="after")
    def _weights(self) -> CaptionChoice:
        if self.choice == "weighted" and not isinstance(self.tags, dict):
            raise ValueError("choice: weighted needs tags with weights, for example tags: {en: 2, de: 1}")
        if isinstance(self.tags, dict) and (not self.tags or any(weight <= 0 for weight in self.tags.values())):
            raise ValueError(f"weights of tags must be above 0, got {self.tags}; leave out the tags you don't want")
        if self.tags == []:
            raise ValueError("tags is an empty list; leave it out to use all captions")
        return self


class DataConfig(StrictModel):
    """Where the samples are and how they become tensors."""

    root: str = Field(description="folder of the shards; relative patterns start here")
    train: str | list[str] = Field(default="train-*.tar", description="shards: globs and braces, {000000..000003}")
    val: dict[str, str | list[str]] = Field(default={"val": "val-*.tar"}, description="evaluation splits by name")
    image_mode: Literal["RGB", "L"] = "RGB"
    resize: Literal["squash", "crop", "pad"] = Field(
        default="squash", description="to a square: ignore the aspect, centre crop, or pad with white"
    )
    frames: int | None = Field(
        default=None, gt=0, description="samples are clips: so many frames of each, evenly spaced; None: single images"
    )
    augment: list[str | dict[str, dict[str, Any] | None]] = Field(
        default=[], description="torchvision.transforms.v2 by name, with arguments; training only"
    )
    captions: CaptionChoice = Field(default_factory=CaptionChoice)
    tokenizer: str | None = Field(
        default=None, description="local path or hub id; None: tokenizer.json beside the shards"
    )
    context_length: int = Field(default=32, ge=2, description="tokens, begin and end included")
    pad_to: Literal["context", "longest"] = Field(
        default="context", description="longest: as long as the longest caption of the rank's batch"
    )
    workers: int = Field(default=0, ge=0, description="loader processes per rank; 0: in the training process")
    cache_mb: int = Field(default=0, ge=0, description="decoded images kept per loader process, in MiB")
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    max_side: int = Field(default=MAX_SIDE, ge=1)

    @field_validator("captions", mode="before")
    @classmethod
    def _choice_by_name(cls, value: object) -> object:
        return {"choice": value} if isinstance(value, str) else value
