"""Nine ways for a glyph to move over the frames of a clip."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOTIONS = (
    "moving left", "moving right", "moving up", "moving down", "growing", "shrinking", "turning left", "turning right",
    "standing still",
)  # fmt: skip
_DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
_LEAST_TRAVEL = 0.7  # part of the room that a moving glyph crosses
_SMALLEST = 0.5  # side of a glyph that grows, over its full one
_TURN = 90.0  # degrees over a clip


def move(glyph: NDArray[np.uint8], motion: int, *, size: int, frames: int, seed: int) -> NDArray[np.uint8]:
    """The frames of a clip.

    Args:
        glyph: uint8 [side, side], black on white, side below ``size``.
        motion: an index of `MOTIONS`.
        size: pixels of a frame's side.
        frames: of the clip, at least 2.
        seed: of the start, drawn so that the whole motion stays inside the frame.

    Returns:
        uint8 [frames, size, size].
    """
    random = np.random.default_rng(seed)
    name, room = MOTIONS[motion], size - len(glyph)
    picture = Image.fromarray(255 - glyph)  # white on black: what lies outside a turned picture is black
    times = np.linspace(0.0, 1.0, frames)
    if name == "shrinking":
        times = times[::-1]
    corner = random.uniform(0, room, size=2)
    pages = []
    for time in times:
        moved, place = picture, corner
        if name in _DIRECTIONS:
            place = _travelled(name, float(time), corner, room)
        elif name in ("growing", "shrinking"):
            side = round(len(glyph) * (_SMALLEST + (1 - _SMALLEST) * float(time)))
            moved = picture.resize((side, side), Image.Resampling.BILINEAR)
            place = corner + (len(glyph) - side) / 2
        elif name != "standing still":
            angle = _TURN * float(time) * (1 if name == "turning left" else -1)
            moved = picture.rotate(angle, Image.Resampling.BILINEAR)
        page = Image.new("L", (size, size))
        page.paste(moved, (round(float(place[0])), round(float(place[1]))))
        pages.append(255 - np.asarray(page))
    return np.stack(pages)


def _travelled(name: str, time: float, corner: NDArray[np.float64], room: int) -> NDArray[np.float64]:
    """The corner of a glyph on its way, of which ``corner`` gives the start and what lies across it."""
    direction = np.array(_DIRECTIONS[name], dtype=np.float64)
    travel = _LEAST_TRAVEL * room
    # along the way the start is drawn anew from what leaves room for the travel
    slack = corner * (1 - _LEAST_TRAVEL)
    start = np.where(direction > 0, slack, np.where(direction < 0, travel + slack, corner))
    return start + direction * travel * time
