"""Glyphs in motion: short clips of one character each, captioned with its name and how it moves."""

from __future__ import annotations

import io
import json
import time
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.order import permute, sample_seeds
from ..data.shard_index import load_index
from ..data.tokenizer import train_tokenizer
from ..errors import PairtileError
from .glyphs import FONTS, Glyph, draw_glyphs, font_folder, split_glyphs, versions
from .motion import MOTIONS, move
from .output import Dropped, ShardWriter, atomic_folder, reuse, write_description
from .pool import default_workers, ordered_map, progress_bar
from .report import PrepareReport
from .scripts import script_of

# Streams of `sample_seeds`, apart from those of the loader.
_MOTION_STREAM, _PATH_STREAM = 11, 12


class GlyphClip(NamedTuple):
    """A glyph, how it moves, and the seed of where it starts."""

    glyph: Glyph
    motion: int
    seed: int

    @property
    def caption(self) -> str:
        return f"{unicodedata.name(chr(self.glyph.code))} {MOTIONS[self.motion]}"


def prepare_glyph_clips(
    out: str | Path,
    *,
    seed: int = 0,
    size: int = 32,
    frames: int = 8,
    workers: int | None = None,
    samples_per_shard: int = 4096,
    vocab_size: int = 2000,
    fonts: Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Draw the glyph clips: one of each drawing of the glyphs data set, in one of nine motions.

    A clip is a grey TIFF of ``frames`` pages of ``size`` x ``size``, black on white. The glyph is 5/8 of the side, so that
    it has room to move; where it starts is random, so that no single frame tells the motion. The caption is the Unicode
    name and the motion ("LATIN SMALL LETTER A moving left").

    Splits: those of the glyphs data set, ``train``, ``font`` (DejaVu Serif Regular) and ``unseen`` (characters never
    seen), and ``pairs``: of each character that train has, one drawing in the motion that train never shows it in.
    Each sample has id = 16 code point + motion, ids.drawing equal for the same drawing in the same motion, ids.character,
    and labels motion, font, cut, script, character.

    Shards are the same bytes for the same arguments and library versions. A complete data set made with the same
    arguments is reused.

    Args:
        seed: decides what is held out, the motions and their starts.
        frames: of a clip, at least 2.
        fonts: file names without ".ttf" (default: all of `FONTS`). limit: characters per font (default: all).
        workers: processes (default: one for each processor).

    Raises:
        PairtileError: ``out`` holds something else, cannot be written, or a font is missing.
    """
    started = time.monotonic()
    out = Path(out).expanduser().absolute()
    chosen = [name for name in FONTS if name in fonts] if fonts is not None else list(FONTS)
    folder_of_fonts = font_folder(chosen if fonts is None else list(fonts))
    if size < 16 or frames < 2 or samples_per_shard < 1:
        raise PairtileError(
            f"size must be at least 16, frames at least 2 and samples_per_shard at least 1, got {size}, {frames} and "
            f"{samples_per_shard}"
        )
    settings = {
        "name": "glyph-clips", "seed": seed, "size": size, "frames": frames, "samples_per_shard": samples_per_shard,
        "vocab_size": vocab_size, "fonts": chosen, "limit": limit,
    }  # fmt: skip
    present = reuse(out, settings)
    if present is not None:
        return present
    workers = default_workers() if workers is None else workers
    with atomic_folder(out) as folder, progress_bar(progress) as bar:
        dropped = Dropped(folder)
        glyphs = draw_glyphs(folder_of_fonts, chosen, size * 5 // 8, limit, workers, bar, dropped)
        dropped.close()
        splits = split_clips(glyphs, seed)
        jobs = [
            (folder / f"{name}-{number:06d}.tar", clips[start : start + samples_per_shard])
            for name, clips in splits.items()
            for number, start in enumerate(range(0, len(clips), samples_per_shard))
        ]
        task = bar.add_task("writing shards", total=len(jobs))
        for _ in ordered_map(partial(_write_shard, size=size, frames=frames), jobs, workers=workers):
            bar.update(task, advance=1, refresh=True)
        train_tokenizer((clip.caption for clip in splits["train"]), vocab_size, folder)
        counts = {
            name: {"samples": len(part), "characters": len({c.glyph.code for c in part}), "shards": f"{name}-*.tar"}
            for name, part in splits.items()
        }
        write_description(
            folder,
            {
                "settings": settings,
                "splits": counts,
                "image": {"size": size, "mode": "L", "frames": frames},
                "dropped": dict(dropped.counts),
                "versions": versions(),
            },
        )
    written = {name: len(part) for name, part in splits.items()}
    listed = out / dropped.path.name if dropped.counts else None
    seconds = time.monotonic() - started
    return PrepareReport(out, sum(written.values()), written, dict(dropped.counts), listed, seconds=seconds)


def split_clips(glyphs: list[Glyph], seed: int) -> dict[str, list[GlyphClip]]:
    """One clip of each glyph of train, font and unseen, and the pairs that train lacks."""
    held = _held_out_motions({glyph.code for glyph in glyphs}, seed)
    parts = split_glyphs(glyphs, seed)
    splits: dict[str, list[GlyphClip]] = {}
    for stream, name in enumerate(("train", "font", "unseen")):
        numbers = np.arange(len(parts[name])) + (stream << 32)
        draws = sample_seeds(seed, 0, numbers, _MOTION_STREAM).tolist()
        paths = sample_seeds(seed, 0, numbers, _PATH_STREAM).tolist()
        splits[name] = []
        for glyph, draw, path in zip(parts[name], draws, paths):
            allowed = [motion for motion in range(len(MOTIONS)) if motion != held[glyph.code]]
            splits[name].append(GlyphClip(glyph, allowed[draw % len(allowed)], path))
    first: dict[int, Glyph] = {}
    rank = {font: number for number, font in enumerate(FONTS)}
    for glyph in sorted(parts["train"], key=lambda each: (each.code, rank[each.font])):
        first.setdefault(glyph.code, glyph)
    paths = sample_seeds(seed, 0, np.array(sorted(first)), _PATH_STREAM).tolist()
    splits["pairs"] = [GlyphClip(first[code], held[code], path) for code, path in zip(sorted(first), paths)]
    return splits


def _held_out_motions(codes: set[int], seed: int) -> dict[int, int]:
    order = permute(np.arange(len(codes)), len(codes), seed, epoch=2)
    return {code: int(place) % len(MOTIONS) for code, place in zip(sorted(codes), order)}


def _write_shard(job: tuple[Path, list[GlyphClip]], size: int, frames: int) -> None:
    path, clips = job
    writer = ShardWriter(path)
    for clip in clips:
        key = f"{clip.glyph.font}-{clip.glyph.code:04X}"
        pages = move(clip.glyph.pixels, clip.motion, size=size, frames=frames, seed=clip.seed)
        writer.add(f"{key}.tif", encode_clip(pages))
        writer.add(f"{key}.json", _record(clip))
    writer.close()
    load_index(path)  # leaves the index beside the shard


def encode_clip(pages: NDArray[np.uint8]) -> bytes:
    """uint8 [T, H, W] as a TIFF, the one animated format whose writer keeps equal frames apart."""
    first, *others = (Image.fromarray(page) for page in pages)
    data = io.BytesIO()
    first.save(data, format="TIFF", save_all=True, append_images=others, compression="tiff_deflate")
    return data.getvalue()


def _record(clip: GlyphClip) -> bytes:
    glyph = clip.glyph
    family, cut = FONTS[glyph.font]
    script = script_of(glyph.code, unicodedata.name(chr(glyph.code)))
    record = {
        "captions": [{"text": clip.caption, "tag": "unicode"}],
        "id": 16 * glyph.code + clip.motion,
        "ids": {"drawing": 16 * glyph.drawing + clip.motion, "character": glyph.code},
        "labels": {
            "motion": MOTIONS[clip.motion], "font": family, "cut": cut, "script": script, "character": chr(glyph.code),
        },
    }  # fmt: skip
    return json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()
