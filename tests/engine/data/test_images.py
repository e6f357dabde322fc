"""Decoding, colour modes, resizing, augmentation."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from pairtile.engine.data import BadSample, DataConfig, Reason, build_image_transform, decode_image
from pairtile.engine.data.images import convert_image
from pairtile.engine.errors import PairtileError


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, format=format, **options)
    return data.getvalue()


def transform(size: int = 8, train: bool = False, **fields: object):
    return build_image_transform(DataConfig.model_validate({"root": ".", **fields}), size, train)


RED = Image.new("RGB", (8, 8), (200, 0, 0))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats(format: str) -> None:
    pixels = transform()(decode_image(encoded(RED, format)))
    assert pixels.shape == (3, 8, 8)
    assert (pixels[:, 4, 4].int() - torch.tensor([200, 0, 0])).abs().max() <= 4


def test_limits_are_read_from_the_header(blank_png: Callable[[int, int], bytes]) -> None:
    data = encoded(Image.new("L", (300, 10)))
    assert decode_image(data, max_pixels=3000, max_side=300).size == (300, 10)
    for limits in ({"max_pixels": 2999}, {"max_side": 299}):
        with pytest.raises(BadSample) as raised:
            decode_image(data, **limits)
        assert raised.value.reason == Reason.IMAGE_TOO_LARGE
    header_only = blank_png(20_000, 20_000)[:60]
    with pytest.raises(BadSample) as raised:
        decode_image(header_only)
    assert raised.value.reason == Reason.IMAGE_TOO_LARGE


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), 255),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 255)), 0),
        (Image.new("LA", (8, 8), (0, 128)), 127),
        (Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)), 255),
        (Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)), 100),
        (Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), 128),
        (Image.new("1", (8, 8), 1), 255),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), 255),
        (Image.new("L", (8, 8), 77), 77),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_modes(image: Image.Image, expected: int, mode: str) -> None:
    converted = convert_image(image, mode)
    assert converted.mode == mode
    assert abs(int(np.asarray(converted).reshape(-1)[0]) - expected) <= 1


def test_transparent_palette_and_grey() -> None:
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0] * 768)
    for image in (palette, Image.new("L", (8, 8), 3)):
        decoded = decode_image(encoded(image, transparency=3))
        assert np.asarray(convert_image(decoded, "RGB")).min() == 255


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 8))
    exif = image.getexif()
    exif[0x0112] = 6
    assert convert_image(decode_image(encoded(image, "JPEG", exif=exif)), "RGB").size == (8, 16)


def test_hostile_metadata_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Image.Image) -> Image.Image:
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    image = RED.copy()
    image.info["exif"] = b"Exif\0\0 nonsense"
    with pytest.raises(BadSample) as raised:
        convert_image(image, "RGB")
    assert raised.value.reason == Reason.UNDECODABLE_IMAGE


def test_resize() -> None:
    wide = Image.new("L", (40, 20), 0)
    wide.paste(100, (10, 0, 30, 20))
    results = {how: transform(image_mode="L", resize=how)(wide)[0] for how in ("squash", "crop", "pad")}
    assert all(result.shape == (8, 8) for result in results.values())
    assert (results["crop"].int() - 100).abs().max() < 12
    assert results["squash"][:, 0].max() < 20
    assert results["pad"][0].unique().tolist() == [255]


def test_same_size_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert torch.equal(transform()(Image.fromarray(pixels)), torch.from_numpy(pixels).permute(2, 0, 1))
    assert not transform(train=True).random


@pytest.mark.parametrize(
    "augment",
    [
        ["RandomHorizontalFlip"],
        [{"RandomResizedCrop": {"scale": [0.5, 1.0], "antialias": True}}],
        [{"RandomResizedCrop": {"size": 6}}],
        [{"RandomAffine": {"degrees": 10, "fill": 255}}, "TrivialAugmentWide"],
        [{"RandomApply": {"transforms": [{"ColorJitter": {"brightness": 0.5}}], "p": 0.9}}],
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_augmentations(augment: list, mode: str) -> None:
    train = transform(train=True, augment=augment, image_mode=mode)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    outputs = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        outputs.append(train(image))
    assert outputs[0].shape == (1 if mode == "L" else 3, 8, 8)
    assert outputs[0].dtype == torch.uint8
    assert torch.equal(outputs[0], outputs[1])
    assert any(not torch.equal(outputs[0], other) for other in outputs[2:])
    assert not transform(train=False, augment=augment).random


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (["RandomHorizontalFlp"], "did you mean RandomHorizontalFlip"),
        ([{"RandomAffine": {"degree": 3}}], "RandomAffine"),
        ([{"RandomAffine": {"degrees": 3}, "RandomErasing": None}], "must be one transform"),
        ([{"Normalize": {"mean": [0.5], "std": [0.5]}}], "Normalize|normalises|float"),
        ([{"Grayscale": {"num_output_channels": 1}}], r"expected torch.uint8 \[3, 8, 8\]"),
    ],
)
def test_augmentation_errors(augment: list, message: str) -> None:
    with pytest.raises(PairtileError, match=message):
        transform(train=True, augment=augment)
