"""The picture: size, frames by pixel, images of all shapes."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor

from pairtile.engine.errors import PairtileError
from pairtile.engine.evaluate import ContactRow, draw_contact_sheet
from pairtile.engine.evaluate import contact_sheet as sheet


def image(channels: int, height: int, width: int, value: int = 128) -> torch.Tensor:
    return torch.full((channels, height, width), value, dtype=torch.uint8)


def corner(row: int, column: int) -> tuple[int, int]:
    """Top left pixel of a cell."""
    left = sheet.MARGIN + sheet.QUERY_WIDTH + sheet.GAP + column * (sheet.CELL + sheet.GAP)
    return left, sheet.HEADER + row * (sheet.CELL + sheet.GAP) + sheet.GAP // 2


def test_size_frames_and_pixels(tmp_path: Path) -> None:
    rows = [
        ContactRow("GREEK SMALL LETTER ALPHA WITH TONOS", [image(1, 32, 32)] * 5, [True] + [False] * 4, "rank 1"),
        ContactRow("wrong first", [image(3, 20, 31), image(3, 400, 150)], [False, True]),
        ContactRow("Supercalifragilistic" * 20, [image(1, 1, 1)], [False]),
    ]
    path = tmp_path / "new" / "sheet.png"
    draw_contact_sheet(path, rows, title="Text to image", subtitle="val")
    picture = Image.open(path).convert("RGB")
    width = 2 * sheet.MARGIN + sheet.QUERY_WIDTH + 5 * (sheet.CELL + sheet.GAP)
    assert picture.size == (width, sheet.HEADER + 3 * (sheet.CELL + sheet.GAP) + sheet.FOOTER)

    green, red = ImageColor.getrgb(sheet.GREEN), ImageColor.getrgb(sheet.RED)

    def frame(row: int, column: int) -> tuple[int, ...]:
        left, top = corner(row, column)
        return picture.getpixel((left - 1, top + sheet.CELL // 2))

    assert frame(0, 0) == green
    assert frame(1, 0) == red
    assert frame(1, 1) == green
    assert frame(0, 1) not in (green, red)
    # 32 pixels fill the cell of 128 by a factor of 4; the frame covers none of them.
    left, top = corner(0, 0)
    assert picture.getpixel((left, top)) == picture.getpixel((left + 127, top + 127)) == (128, 128, 128)


def test_enlarging_keeps_pixels_sharp() -> None:
    checker = torch.tensor([[[0, 255], [255, 0]]], dtype=torch.uint8)
    cell = sheet._thumbnail(checker)
    assert sorted(cell.getcolors()) == [(64 * 128, (0, 0, 0)), (64 * 128, (255, 255, 255))]


def test_wrapping_fits_the_column() -> None:
    font = sheet.sheet_font(15)
    lines = sheet.wrap("one " * 60 + "x" * 200, font, 200, 4)
    assert len(lines) == 4
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert sheet.wrap("short", font, 200, 4) == ["short"]


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        draw_contact_sheet(tmp_path / "a.png", [], title="")
    with pytest.raises(ValueError, match=r"uint8 image \[1 or 3"):
        draw_contact_sheet(tmp_path / "a.png", [ContactRow("q", [torch.zeros(3, 4, 4)], [True])], title="")
    (tmp_path / "file").write_text("")
    with pytest.raises(PairtileError, match="cannot write"):
        draw_contact_sheet(tmp_path / "file" / "a.png", [ContactRow("q", [image(1, 4, 4)], [True])], title="")
