"""A picture of retrieval: one query per row, its best images beside it, the right ones framed in green."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import PairtileError

CELL = 128  # side of the square an image is fitted into, in pixels
GAP = 20
MARGIN = 28
QUERY_WIDTH = 300
QUERY_LINES = 4
HEADER = 96
FOOTER = 44

INK, FAINT, LINE, BACKDROP = "#1f2328", "#6e7781", "#e4e7eb", "#ffffff"
GREEN, RED = "#1a9641", "#d7301f"


@dataclass(frozen=True)
class ContactRow:
    """One query and what was found for it, best first."""

    query: str
    images: Sequence[Tensor]  # uint8 [C, H, W] each, C = 1 or 3, any size; clips [T, C, H, W]
    correct: Sequence[bool]
    note: str = ""


def draw_contact_sheet(path: Path, rows: Sequence[ContactRow], *, title: str, subtitle: str = "") -> None:
    """Writes a PNG with one row per query.

    Correct images have a thick green frame; a wrong image in the first place has a thin red one. Small images are
    enlarged by a whole factor without smoothing, large ones are reduced.

    Args:
        path: the PNG; its folder is created.
        rows: at least one; a row may have fewer images than another.
        title: first line. subtitle: second line, smaller.

    Raises:
        PairtileError: the file cannot be written.
        ValueError: no rows, or an image that is not uint8 [1 or 3, H, W].
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    columns = max(len(row.images) for row in rows)
    width = 2 * MARGIN + QUERY_WIDTH + columns * (CELL + GAP)
    height = HEADER + len(rows) * (CELL + GAP) + FOOTER
    canvas = Image.new("RGB", (width, height), BACKDROP)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 20), title, font=sheet_font(22, bold=True), fill=INK)
    draw.text((MARGIN, 52), subtitle, font=sheet_font(13), fill=FAINT)
    for column in range(columns):
        middle = _cell_left(column) + CELL // 2
        draw.text((middle, HEADER - 8), f"{column + 1}", font=sheet_font(12), fill=FAINT, anchor="ms")
    for number, row in enumerate(rows):
        _draw_row(canvas, draw, row, HEADER + number * (CELL + GAP))
    _draw_legend(draw, height - FOOTER + 14)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(path, format="PNG")
    except OSError as error:
        raise PairtileError(
            f"cannot write the contact sheet {path}: {error}; choose a folder you can write to"
        ) from None


def _cell_left(column: int) -> int:
    return MARGIN + QUERY_WIDTH + GAP + column * (CELL + GAP)


def _draw_row(canvas: Image.Image, draw: ImageDraw.ImageDraw, row: ContactRow, top: int) -> None:
    draw.line([(MARGIN, top - 2), (canvas.width - MARGIN, top - 2)], fill=LINE)
    lines = wrap(row.query, sheet_font(15), QUERY_WIDTH - GAP, QUERY_LINES)
    text_height = 21 * len(lines) + (20 if row.note else 0)
    y = top + GAP // 2 + (CELL - text_height) // 2
    for line in lines:
        draw.text((MARGIN, y), line, font=sheet_font(15), fill=INK)
        y += 21
    draw.text((MARGIN, y + 2), row.note, font=sheet_font(12), fill=FAINT)
    for column, (image, correct) in enumerate(zip(row.images, row.correct)):
        left, upper = _cell_left(column), top + GAP // 2
        canvas.paste(_thumbnail(image), (left, upper))
        box = (left, upper, left + CELL - 1, upper + CELL - 1)
        if correct:
            _frame(draw, box, GREEN, 6)
        elif column == 0:
            _frame(draw, box, RED, 2)
        else:
            _frame(draw, box, LINE, 1)


def _frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: str, thickness: int) -> None:
    """Drawn around the box, so that it covers nothing of the image."""
    left, upper, right, lower = box
    outer = (left - thickness, upper - thickness, right + thickness, lower + thickness)
    draw.rectangle(outer, outline=colour, width=thickness)


def _draw_legend(draw: ImageDraw.ImageDraw, y: int) -> None:
    x = MARGIN
    for colour, thickness, meaning in ((GREEN, 4, "correct"), (RED, 2, "first place, wrong")):
        draw.rectangle((x, y, x + 15, y + 15), outline=colour, width=thickness)
        draw.text((x + 24, y + 8), meaning, font=sheet_font(12), fill=FAINT, anchor="lm")
        x += 24 + int(sheet_font(12).getlength(meaning)) + 28


def _thumbnail(image: Tensor) -> Image.Image:
    """uint8 [1 or 3, H, W], or a clip of such -> RGB CELL x CELL, centred, proportions kept."""
    if image.dim() == 4:
        image = side_by_side(image)
    if image.dim() != 3 or image.shape[0] not in (1, 3) or image.dtype != torch.uint8:
        raise ValueError(f"expected a uint8 image [1 or 3, H, W], got {image.dtype} {tuple(image.shape)}")
    array = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    picture = Image.fromarray(array, mode="RGB")
    largest = max(picture.size)
    if largest <= CELL:
        factor = CELL // largest
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    else:
        size = tuple(max(1, round(side * CELL / largest)) for side in picture.size)
        picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), "#f6f8fa")
    cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    return cell


def side_by_side(clip: Tensor) -> Tensor:
    """uint8 [T, C, H, W] -> [C, rows H, columns W]: the frames in reading order, on as square a grid as they fill."""
    frames, channels, height, width = clip.shape
    columns = math.ceil(math.sqrt(frames))
    rows = math.ceil(frames / columns)
    blank = clip.new_full((rows * columns - frames, channels, height, width), 255)
    grid = torch.cat([clip, blank]).unflatten(0, (rows, columns))
    return grid.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)


@lru_cache
def sheet_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans; the basic layout engine, since raqm is missing or unstable on some machines."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Breaks ``text`` at spaces (long words anywhere) into at most ``lines`` lines of ``width`` pixels."""
    wrapped: list[str] = [""]
    for word in text.split():
        joined = f"{wrapped[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            wrapped[-1] = joined
            continue
        if wrapped[-1]:
            wrapped.append("")
        for character in word:
            if font.getlength(wrapped[-1] + character) > width:
                wrapped.append("")
            wrapped[-1] += character
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        wrapped = [*wrapped[: lines - 1], last + "…"]
    return wrapped
