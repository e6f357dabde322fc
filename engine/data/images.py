"""From encoded bytes to uint8 tensors: decoding within limits, colour modes, resizing, augmentation."""

from __future__ import annotations

import difflib
import io
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from ..errors import PairtileError
from .config import MAX_PIXELS, MAX_SIDE, DataConfig
from .schema import BadSample, Reason

# Only raster formats whose decoders are plain readers: no EPS (which starts another program), no plugins.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE) -> Image.Image:
    """The first frame of an encoded image, decoded. Its size is checked in the header, before decoding.

    Raises:
        BadSample: more than ``max_pixels`` pixels or a side above ``max_side`` ("image too large"); not an image
            of a known format, damaged or cut short ("undecodable image").
    """
    return _decode(data, None, max_pixels, max_side)[0]


def decode_clip(
    data: bytes, frames: int, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE
) -> list[Image.Image]:
    """``frames`` frames of an animated image (TIFF, GIF, WebP, PNG), evenly spaced; some repeat if it has fewer.

    Raises:
        BadSample: as `decode_image`; ``max_pixels`` counts the pixels of all frames that the file has. Or frames of several
            sizes.
    """
    return _decode(data, frames, max_pixels, max_side)


def _decode(data: bytes, frames: int | None, max_pixels: int, max_side: int) -> list[Image.Image]:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and limit < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels  # the user asked for it; otherwise Pillow would refuse first
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        (width, height), count = image.size, 1 if frames is None else getattr(image, "n_frames", 1)
        if width * height * count > max_pixels or max(width, height) > max_side:
            raise BadSample(Reason.IMAGE_TOO_LARGE, f"{width} x {height} pixels" + f", {count} frames" * (count > 1))
        if frames is None:
            image.load()
            return [image]
        found = {}
        # in their order, as most formats store differences; the middles of equal parts
        for place in sorted({(2 * each + 1) * count // (2 * frames) for each in range(frames)}):
            image.seek(place)
            if image.size != (width, height):  # a TIFF's pages have sizes of their own, which no limit has seen
                said = f"frame {place} has {image.size[0]} x {image.size[1]} pixels, the first {width} x {height}"
                raise BadSample(Reason.UNDECODABLE_IMAGE, said)
            found[place] = image.copy()
        return [found[(2 * each + 1) * count // (2 * frames)] for each in range(frames)]
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(Reason.IMAGE_TOO_LARGE, str(error)) from None
    except Exception as error:  # decoders of hostile files raise almost anything
        raise BadSample(Reason.UNDECODABLE_IMAGE, f"{type(error).__name__}: {error}") from None


def _deep_to_grey(image: Image.Image) -> Image.Image:
    """16-bit and float greys to 8 bit: 16-bit values over 257, floats in 0..1 times 255."""
    values = np.asarray(image, dtype=np.float64)
    peak = values.max(initial=0.0)
    if image.mode == "F":
        values = values * 255 if peak <= 1 else values
    elif image.mode.startswith("I;16") or peak > 255:
        values = values / 257
    return Image.fromarray(np.nan_to_num(values).clip(0, 255).round().astype(np.uint8))


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """An image in mode "RGB" or "L": turned upright by its EXIF, transparency on white, 16 bit scaled down.

    Raises:
        BadSample: metadata or a colour mode that cannot be read ("undecodable image").
    """
    if image.mode == mode and not image.info:
        return image
    try:
        return _convert(image, mode)
    except Exception as error:  # like decoders, parsers of hostile metadata raise almost anything
        raise BadSample(Reason.UNDECODABLE_IMAGE, f"{type(error).__name__}: {error}") from None


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def resize_image(image: Image.Image, size: int, how: str) -> Image.Image:
    """A ``size`` x ``size`` image, bicubic with antialiasing. ``how``: "squash", "crop" or "pad" (with white)."""
    if image.size == (size, size):
        return image
    if how == "squash":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if how == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    white = 255 if image.mode == "L" else (255, 255, 255)
    return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=white)


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 [C, H, W] of an image in mode "L" or "RGB"."""
    pixels: NDArray[np.uint8] = np.array(image, dtype=np.uint8)
    if pixels.ndim == 2:
        return torch.from_numpy(pixels)[None]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _transform_class(name: str) -> type[v2.Transform]:
    known = {n: c for n, c in vars(v2).items() if isinstance(c, type) and issubclass(c, v2.Transform)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise PairtileError(f"data.augment: torchvision.transforms.v2 has no transform {name!r}{hint}")
    return known[name]


def _build_augmentation(entry: str | dict[str, Any], image_size: int) -> tuple[v2.Transform, bool]:
    """(transform, whether it sets the size itself) from "Name" or {Name: {argument: value}}."""
    if isinstance(entry, dict) and len(entry) != 1:
        raise PairtileError(
            f"data.augment: each item must be one transform, got {entry!r}; start each with its own '-'"
        )
    name, given = (entry, None) if isinstance(entry, str) else next(iter(entry.items()))
    arguments = dict(given or {})
    if isinstance(arguments.get("transforms"), list):  # RandomApply, RandomChoice, RandomOrder
        arguments["transforms"] = [_build_augmentation(inner, image_size)[0] for inner in arguments["transforms"]]
    kind = _transform_class(name)
    code = kind.__init__.__code__
    parameters = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    sized = "size" in parameters
    if sized:
        arguments.setdefault("size", [image_size, image_size])
    try:
        return kind(**arguments), sized
    except (TypeError, ValueError) as error:
        raise PairtileError(f"data.augment: {name}({arguments}): {error}") from None


class ImageTransform:
    """PIL image -> uint8 [C, image_size, image_size]; with ``config.frames`` a list of them -> uint8 [T, C, H, W].

    Augmentations run in order on uint8 tensors. If one of them takes a size (RandomResizedCrop), they see the
    image as it was stored; otherwise the resized one. What comes out is resized if it has another size. The frames of
    a clip are augmented alike.

    Attributes:
        shape: (C, H, W), or (T, C, H, W) of clips. random: whether two calls may differ (then calls draw from torch's CPU generator).
    """

    def __init__(self, config: DataConfig, image_size: int, augmentations: list[tuple[v2.Transform, bool]]) -> None:
        self.mode = config.image_mode
        self.resize = config.resize
        self.size = image_size
        clip = () if config.frames is None else (config.frames,)
        self.shape = (*clip, 3 if self.mode == "RGB" else 1, image_size, image_size)
        self.random = bool(augmentations)
        self._first_resize = not any(sized for _, sized in augmentations)
        self._augment = v2.Compose([transform for transform, _ in augmentations]) if augmentations else None

    def __call__(self, image: Image.Image | Sequence[Image.Image]) -> Tensor:
        if isinstance(image, Image.Image):
            pixels = self._pixels(image)
        else:
            pixels = torch.stack([self._pixels(frame) for frame in image])
        if self._augment is None:
            return pixels
        pixels = cast(Tensor, self._augment(pixels))
        if pixels.shape[-2:] != self.shape[-2:]:
            pixels = v2.functional.resize_image(pixels, [self.size, self.size], antialias=True)
        return pixels

    def _pixels(self, image: Image.Image) -> Tensor:
        image = convert_image(image, self.mode)
        if self._augment is None or self._first_resize:
            image = resize_image(image, self.size, self.resize)
        return to_tensor(image)


def build_image_transform(config: DataConfig, image_size: int, train: bool) -> ImageTransform:
    """The transform of a split: with ``config.augment`` for training, without for evaluation.

    Raises:
        PairtileError: an unknown transform, wrong arguments, or one that does not give uint8 images back.
    """
    if image_size < 1:
        raise PairtileError(f"image_size must be at least 1, got {image_size}")
    augmentations = [_build_augmentation(entry, image_size) for entry in config.augment] if train else []
    transform = ImageTransform(config, image_size, augmentations)
    if augmentations:
        image = Image.new(config.image_mode, (image_size + 7, image_size + 3))
        try:
            with torch.random.fork_rng(devices=[]):
                probe = transform(image if config.frames is None else [image] * config.frames)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PairtileError(f"data.augment fails on a uint8 image: {str(error).splitlines()[0]}") from None
        if probe.dtype != torch.uint8 or tuple(probe.shape) != transform.shape:
            raise PairtileError(
                f"data.augment gives {probe.dtype} {list(probe.shape)}, expected torch.uint8 {list(transform.shape)}; "
                "leave out conversions and normalisation, the model normalises"
            )
    return transform
