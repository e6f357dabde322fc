"""A picture of token merging: images, and beside each which of its patches became one token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...kernels.token_merging import draw_merged_regions, merged_sources
from ..data.order import permute
from ..errors import PairtileError
from .contact_sheet import BACKDROP, FAINT, GAP, INK, LINE, MARGIN, sheet_font, side_by_side, wrap

if TYPE_CHECKING:
    from ..data import ShardDataset
    from ..model import DualEncoder

_SIDE = 240  # of an enlarged image at least about so many pixels
_TEXT = 76  # height of what is written below it
_OUTLINE = (215, 48, 31)


def draw_merged_tokens(path: Path, model: DualEncoder, dataset: ShardDataset, *, count: int = 8, seed: int = 0) -> None:
    """Draws images of a split, drawn at random, beside the regions that the image tower merged them into.

    Patches of one token have their mean colour and an outline. In a clip a token may hold patches of several frames.

    Args:
        path: the PNG; its folder is created.
        model: merges tokens in its image tower, and keeps their sources (``merge_tokens(..., trace_source=True)``).
        dataset: of images that the model takes.
        count: how many images, fewer if the split has fewer.
        seed: of the choice.

    Raises:
        PairtileError: no readable image, a tower that does not say how its patches lie, or a file that cannot be written.
    """
    indices = permute(torch.arange(min(count, len(dataset))).numpy(), len(dataset), seed)
    batch = dataset.eval_batch(indices)
    if not len(batch):
        raise PairtileError(f"none of the images can be read: {', '.join(sorted({why for _, why in batch.skipped}))}")
    with torch.inference_mode():
        model.eval().embed_image(batch.images.to(model.logit_scale.device))
    places = merged_sources(model.vision).cpu()
    grid = patch_grid(model.vision)
    rows = []
    for image, place in zip(batch.images, places.view(len(batch), -1, places.shape[-1])):
        frames = _enlarged(image if image.dim() == 4 else image[None])
        rows.append((frames, _merged(frames, place, grid), sum(len(each.unique()) for each in place)))
    captions = [each[0].text for each in batch.captions]
    _save(path, rows, captions, first=places[0].numel() * (places.shape[0] // len(batch)))


def patch_grid(tower: Any) -> tuple[int, int]:
    """(rows, columns) of the patches of a tower of timm or transformers.

    Raises:
        PairtileError: a tower that does not say.
    """
    grid = getattr(getattr(tower, "patch_embed", None), "grid_size", None)
    if grid is not None:
        return grid[0], grid[1]
    sizes = getattr(tower, "config", None)
    if sizes is not None and isinstance(getattr(sizes, "patch_size", None), int):
        side = sizes.image_size // sizes.patch_size
        return side, side
    raise PairtileError(f"a {type(tower).__name__} does not say how its patches lie: it has no patch_embed.grid_size")


def _enlarged(frames: Tensor) -> Tensor:
    """uint8 [T, C, H, W] -> [T, H f, W f, 3], f such that all frames side by side are about `_SIDE` wide."""
    factor = max(1, round(_SIDE / max(side_by_side(frames).shape[1:])))
    wide = frames.expand(-1, 3, -1, -1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return wide.permute(0, 2, 3, 1).contiguous()


def _merged(frames: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """The frames [T, H, W, 3] with the regions of their tokens; places int64 [clips, frames of a clip x tokens]."""
    rows, columns = grid
    clips = len(places)
    joined = len(frames) // clips
    patches = places.view(clips, joined, -1)[:, :, -rows * columns :]
    drawn = [
        # one tall image: a token may hold patches of several of its frames
        draw_merged_regions(tall.flatten(0, 1), patch.flatten(), (joined * rows, columns), outline=_OUTLINE)
        for tall, patch in zip(frames.view(clips, joined, *frames.shape[1:]), patches)
    ]
    return torch.stack(drawn).view_as(frames)


def _picture(frames: Tensor) -> Image.Image:
    joined = side_by_side(frames.permute(0, 3, 1, 2)).permute(1, 2, 0).contiguous()
    return Image.fromarray(joined.numpy())


def _save(path: Path, rows: list[tuple[Tensor, Tensor, int]], captions: list[str], first: int) -> None:
    """Two samples a line, each the image, its regions, and below them its caption."""
    pictures = [(_picture(frames), _picture(merged), left) for frames, merged, left in rows]
    width, height = pictures[0][0].size
    cell = 2 * width + 2 * GAP
    lines = -(-len(pictures) // 2)
    canvas = Image.new("RGB", (2 * MARGIN + 2 * cell, 2 * MARGIN + lines * (height + _TEXT)), BACKDROP)
    draw = ImageDraw.Draw(canvas)
    for number, ((image, merged, left), caption) in enumerate(zip(pictures, captions)):
        x, y = MARGIN + number % 2 * cell, MARGIN + number // 2 * (height + _TEXT)
        for picture, left_edge in ((image, x), (merged, x + width + GAP // 2)):
            draw.rectangle((left_edge - 1, y - 1, left_edge + width, y + height), outline=LINE)
            canvas.paste(picture, (left_edge, y))
        y += height + 6
        for line in wrap(caption, sheet_font(15), cell - 2 * GAP, 2):
            draw.text((x, y), line, font=sheet_font(15), fill=INK)
            y += 19
        draw.text((x, y + 2), f"{first} tokens became {left}", font=sheet_font(12), fill=FAINT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(path, format="PNG")
    except OSError as error:
        raise PairtileError(f"cannot write {path}: {error}; choose a folder you can write to") from None
