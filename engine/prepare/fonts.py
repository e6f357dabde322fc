"""Drawing the characters of a font: one grey image for each, all on one scale and one baseline."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Parts of the image's side. An em this large lets an accented capital (0.93 em above the baseline in DejaVu)
# and a descender (0.24 em below) just fit.
_EM = 0.875
_BASELINE = 0.79
_UNMAPPED = "\U0010fffe"  # a noncharacter: no font draws it, so it shows the missing-glyph box


@dataclass
class FontGlyphs:
    """The usable characters of one font file.

    Attributes:
        name: file name without ".ttf". code_points: int32 [n], ascending. images: uint8 [n, size, size], black
            on white. left_out: (code point, reason) of the others.
    """

    name: str
    code_points: NDArray[np.int32]
    images: NDArray[np.uint8]
    left_out: list[tuple[int, str]]


def named_characters(path: Path) -> list[int]:
    """Code points that the font maps to a glyph and that Unicode names, in the basic plane, ascending."""
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as font:
        mapped = font.getBestCmap()
    named = (code for code in mapped if code <= 0xFFFF and unicodedata.name(chr(code), ""))
    return sorted(code for code in named if mapped[code] != ".notdef")


class _Pen:
    """Draws single characters of a font at falling sizes."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.em = round(size * _EM)
        self.baseline = round(size * _BASELINE)
        self._fonts: dict[int, ImageFont.FreeTypeFont] = {}

    def ink(self, character: str, em: int) -> tuple[Image.Image, int] | None:
        """(the ink, white on black and cut to its box; its top relative to the baseline), None if blank."""
        font = self._fonts.get(em)
        if font is None:
            # The raqm layout crashes on some of these characters, and single characters need no shaping.
            font = ImageFont.truetype(self.path, em, layout_engine=ImageFont.Layout.BASIC)
            self._fonts[em] = font
        left, top, right, bottom = (round(edge) for edge in font.getbbox(character, anchor="ls"))
        canvas = Image.new("L", (right - left + 4, bottom - top + 4))
        ImageDraw.Draw(canvas).text((2 - left, 2 - top), character, fill=255, font=font, anchor="ls")
        box = canvas.getbbox()
        return None if box is None else (canvas.crop(box), top - 2 + box[1])

    def draw(self, character: str) -> Image.Image | None:
        """The character black on white: centred, on the common baseline, shrunk only if it does not fit."""
        em = self.em
        found = self.ink(character, em)
        while found is not None and max(found[0].size) > self.size and em > 1:
            em = max(1, min(em - 1, em * self.size // max(found[0].size)))
            found = self.ink(character, em)
        if found is None:
            return None
        ink, top = found
        x = (self.size - ink.width) // 2
        y = min(max(self.baseline + top, 0), self.size - ink.height)
        image = Image.new("L", (self.size, self.size), 255)
        image.paste(0, (x, y), mask=ink)
        return image


def draw_font(path: Path, size: int, limit: int | None = None) -> FontGlyphs:
    """All named characters of a font (the first ``limit``), without blank ones and missing-glyph boxes."""
    pen = _Pen(path, size)
    missing = pen.ink(_UNMAPPED, pen.em)
    missing_bytes = None if missing is None else (missing[0].size, missing[0].tobytes())
    codes: list[int] = []
    images: list[NDArray[np.uint8]] = []
    left_out: list[tuple[int, str]] = []
    for code in named_characters(path)[:limit]:
        image = pen.draw(chr(code))
        if image is None:
            left_out.append((code, "blank glyph"))
            continue
        ink = pen.ink(chr(code), pen.em)
        if ink is not None and (ink[0].size, ink[0].tobytes()) == missing_bytes:
            left_out.append((code, "missing-glyph box"))
            continue
        codes.append(code)
        images.append(np.asarray(image))
    stacked = np.stack(images) if images else np.empty((0, size, size), dtype=np.uint8)
    return FontGlyphs(path.stem, np.array(codes, dtype=np.int32), stacked, left_out)
