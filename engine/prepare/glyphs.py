"""The embedded data set: the characters of the fonts that matplotlib ships, with their Unicode names."""

from __future__ import annotations

import io
import json
import platform
import time
import unicodedata
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, features

from ..data.order import permute
from ..data.shard_index import load_index
from ..data.tokenizer import train_tokenizer
from ..errors import PairtileError
from .fonts import FontGlyphs, draw_font
from .output import Dropped, ShardWriter, atomic_folder, reuse, write_description
from .pool import default_workers, ordered_map, progress_bar
from .report import PrepareReport
from .scripts import script_of

# file -> (family, cut). The regular cuts come first, in the order in which an unseen character is looked up.
FONTS = {
    "DejaVuSans": ("DejaVu Sans", "Regular"),
    "STIXGeneral": ("STIXGeneral", "Regular"),
    "DejaVuSansMono": ("DejaVu Sans Mono", "Regular"),
    "DejaVuSerif": ("DejaVu Serif", "Regular"),
    "DejaVuSans-Bold": ("DejaVu Sans", "Bold"),
    "DejaVuSans-BoldOblique": ("DejaVu Sans", "Bold Oblique"),
    "DejaVuSans-Oblique": ("DejaVu Sans", "Oblique"),
    "DejaVuSansMono-Bold": ("DejaVu Sans Mono", "Bold"),
    "DejaVuSansMono-BoldOblique": ("DejaVu Sans Mono", "Bold Oblique"),
    "DejaVuSansMono-Oblique": ("DejaVu Sans Mono", "Oblique"),
    "DejaVuSerif-Bold": ("DejaVu Serif", "Bold"),
    "DejaVuSerif-BoldItalic": ("DejaVu Serif", "Bold Italic"),
    "DejaVuSerif-Italic": ("DejaVu Serif", "Italic"),
    "STIXGeneralBol": ("STIXGeneral", "Bold"),
    "STIXGeneralBolIta": ("STIXGeneral", "Bold Italic"),
    "STIXGeneralItalic": ("STIXGeneral", "Italic"),
}
HELD_OUT_FAMILY = "DejaVu Serif"
HELD_OUT_CHARACTERS = 0.1


class Glyph(NamedTuple):
    """A drawing: its font, its code point, a number that equal drawings share, and uint8 [size, size]."""

    font: str
    code: int
    drawing: int
    pixels: np.ndarray


def draw_glyphs(
    folder: Path, fonts: Sequence[str], size: int, limit: int | None, workers: int, bar: Any, dropped: Dropped
) -> list[Glyph]:
    """All glyphs of the fonts in ``folder``, by font and code point; what is left out goes to ``dropped``."""
    task = bar.add_task("drawing fonts", total=len(fonts))
    paths = [folder / f"{name}.ttf" for name in fonts]
    drawn = []
    for _, font in ordered_map(partial(draw_font, size=size, limit=limit), paths, workers=workers):
        bar.update(task, advance=1, refresh=True)
        drawn.append(font)
        for code, reason in font.left_out:
            dropped.add(f"{font.name}-{code:04X}", reason)
    return _number_drawings(drawn)


def _number_drawings(drawn: list[FontGlyphs]) -> list[Glyph]:
    """All glyphs, by font and code point; ``drawing`` is the same number where the pixels are the same."""
    numbers: dict[bytes, int] = {}
    return [
        Glyph(font.name, int(code), numbers.setdefault(pixels.tobytes(), len(numbers)), pixels)
        for font in drawn
        for code, pixels in zip(font.code_points, font.images)
    ]


def split_glyphs(glyphs: list[Glyph], seed: int) -> dict[str, list[Glyph]]:
    """Training glyphs shuffled, the others by code point.

    train: 90% of the characters in every font but the held-out family. font: the held-out family's regular cut,
    characters that train has. unseen: one drawing of each character that train lacks. font_all, unseen_all: the
    rest, of the held-out family and of the other fonts.
    """
    codes = sorted({glyph.code for glyph in glyphs})
    held = permute(np.arange(round(len(codes) * HELD_OUT_CHARACTERS)), len(codes), seed)
    held_codes = {codes[position] for position in held}
    train = [g for g in glyphs if g.code not in held_codes and FONTS[g.font][0] != HELD_OUT_FAMILY]
    trained = {glyph.code for glyph in train}
    splits: dict[str, list[Glyph]] = {"train": [], "font": [], "unseen": [], "font_all": [], "unseen_all": []}
    splits["train"] = [train[position] for position in permute(np.arange(len(train)), len(train), seed, epoch=1)]

    rank = {font: number for number, font in enumerate(FONTS)}
    shown: set[int] = set()
    for glyph in sorted(glyphs, key=lambda g: (g.code, rank[g.font])):
        held_family = FONTS[glyph.font][0] == HELD_OUT_FAMILY
        if glyph.code not in trained and glyph.code not in shown:
            shown.add(glyph.code)
            splits["unseen"].append(glyph)
        elif held_family:
            regular = FONTS[glyph.font][1] == "Regular" and glyph.code in trained
            splits["font" if regular else "font_all"].append(glyph)
        elif glyph.code not in trained:
            splits["unseen_all"].append(glyph)
    return splits


def _record(glyph: Glyph, drawn_in_train: bool) -> bytes:
    name = unicodedata.name(chr(glyph.code))
    family, cut = FONTS[glyph.font]
    record = {
        "captions": [{"text": name, "tag": "unicode"}],
        "id": glyph.code,
        "ids": {"drawing": glyph.drawing},
        "flags": {"drawing_in_train": drawn_in_train},
        "labels": {
            "font": family, "cut": cut, "script": script_of(glyph.code, name), "character": chr(glyph.code),
        },
    }  # fmt: skip
    return json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()


def _write_shard(job: tuple[Path, list[Glyph], list[bytes]]) -> None:
    path, glyphs, records = job
    writer = ShardWriter(path)
    for glyph, record in zip(glyphs, records):
        png = io.BytesIO()
        Image.fromarray(glyph.pixels).save(png, format="PNG")
        key = f"{glyph.font}-{glyph.code:04X}"
        writer.add(f"{key}.png", png.getvalue())
        writer.add(f"{key}.json", record)
    writer.close()
    load_index(path)  # leaves the index beside the shard


def _shard_jobs(
    folder: Path, splits: dict[str, list[Glyph]], samples_per_shard: int
) -> list[tuple[Path, list[Glyph], list[bytes]]]:
    in_train = {glyph.drawing for glyph in splits["train"]}
    jobs = []
    for name, glyphs in splits.items():
        for number, start in enumerate(range(0, len(glyphs), samples_per_shard)):
            part = glyphs[start : start + samples_per_shard]
            records = [_record(glyph, glyph.drawing in in_train) for glyph in part]
            jobs.append((folder / f"{name}-{number:06d}.tar", part, records))
    return jobs


def font_folder(fonts: Sequence[str]) -> Path:
    """Where matplotlib keeps these fonts. Raises PairtileError for an unknown or a missing one."""
    try:
        import matplotlib
    except ImportError:
        raise PairtileError("the fonts come with matplotlib; install it: pip install 'pairtile[train]'") from None
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name in fonts:
        if name not in FONTS:
            raise PairtileError(f"unknown font {name!r}; known are {', '.join(FONTS)}")
        if not (folder / f"{name}.ttf").is_file():
            raise PairtileError(f"matplotlib's font {folder / name}.ttf is missing; reinstall matplotlib")
    return folder


def versions() -> dict[str, str | None]:
    """Of everything that the pixels depend on."""
    packages = {name: version(name) for name in ("pillow", "matplotlib", "fonttools", "tokenizers")}
    return {
        **packages,
        "freetype": features.version("freetype2"),
        "unicode": unicodedata.unidata_version,
        "python": platform.python_version(),
    }


def prepare_glyphs(
    out: str | Path,
    *,
    seed: int = 0,
    size: int = 32,
    workers: int | None = None,
    samples_per_shard: int = 8192,
    vocab_size: int = 2000,
    fonts: Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Draw the glyphs data set: some 50,000 images of 5,900 characters, about 15 seconds on two cores.

    Images are "L" PNGs of ``size`` x ``size``, black on white, all on one scale and one baseline (a glyph that
    does not fit is moved, then shrunk). Characters are those of Unicode's basic plane that a font maps and
    Unicode names; beyond it the fonts hold mathematical letters, which repeat the cuts. Blank glyphs and
    missing-glyph boxes are left out and listed.

    Splits: ``train``; ``font`` (DejaVu Serif Regular, characters seen in training); ``unseen`` (one image of
    each never-seen character); ``font_all`` and ``unseen_all`` (the rest). Each sample has id = code point,
    ids.drawing (equal where the pixels are), flags.drawing_in_train, labels font, cut, script, character, and
    the Unicode name as its caption.

    Shards are the same bytes for the same arguments and library versions. A complete data set made with the
    same arguments is reused.

    Args:
        seed: decides the held-out characters and the order of train.
        fonts: file names without ".ttf" (default: all of `FONTS`). limit: characters per font (default: all).
        workers: processes (default: one for each processor).

    Raises:
        PairtileError: ``out`` holds something else, cannot be written, or a font is missing.
    """
    started = time.monotonic()
    out = Path(out).expanduser().absolute()
    chosen = [name for name in FONTS if name in fonts] if fonts is not None else list(FONTS)
    folder_of_fonts = font_folder(chosen if fonts is None else list(fonts))
    if size < 8 or samples_per_shard < 1:
        raise PairtileError(
            f"size must be at least 8 and samples_per_shard at least 1, got {size} and {samples_per_shard}"
        )
    settings = {
        "name": "glyphs", "seed": seed, "size": size, "samples_per_shard": samples_per_shard,
        "vocab_size": vocab_size, "fonts": chosen, "limit": limit,
    }  # fmt: skip
    present = reuse(out, settings)
    if present is not None:
        return present
    workers = default_workers() if workers is None else workers
    with atomic_folder(out) as folder, progress_bar(progress) as bar:
        dropped = Dropped(folder)
        glyphs = draw_glyphs(folder_of_fonts, chosen, size, limit, workers, bar, dropped)
        dropped.close()
        splits = split_glyphs(glyphs, seed)
        jobs = _shard_jobs(folder, splits, samples_per_shard)
        task = bar.add_task("writing shards", total=len(jobs))
        for _ in ordered_map(_write_shard, jobs, workers=workers):
            bar.update(task, advance=1, refresh=True)
        train_tokenizer((unicodedata.name(chr(g.code)) for g in splits["train"]), vocab_size, folder)
        counts = {
            name: {"samples": len(part), "characters": len({g.code for g in part}), "shards": f"{name}-*.tar"}
            for name, part in splits.items()
        }
        write_description(
            folder,
            {
                "settings": settings,
                "splits": counts,
                "image": {"size": size, "mode": "L"},
                "dropped": dict(dropped.counts),
                "versions": versions(),
            },
        )
    written = {name: len(part) for name, part in splits.items()}
    listed = out / dropped.path.name if dropped.counts else None
    seconds = time.monotonic() - started
    return PrepareReport(out, sum(written.values()), written, dict(dropped.counts), listed, seconds=seconds)
