"""``pairtile prepare``: glyphs, glyph-clips, folder, csv, jsonl, webdataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from ..errors import PairtileError
from .folder import prepare_folder
from .glyph_clips import prepare_glyph_clips
from .glyphs import prepare_glyphs
from .options import Format, WriteOptions
from .report import PrepareReport
from .table import prepare_csv, prepare_jsonl
from .tokenizer import prepare_tokenizer
from .webdataset import prepare_webdataset

prepare = typer.Typer(
    help="Make webdataset shards: an embedded data set, or your own images and captions.", no_args_is_help=True
)

Out = Annotated[Path, typer.Option(help="the new folder of shards")]
Size = Annotated[int | None, typer.Option(help="scale larger images down to this longer side; default: keep")]
ImageFormat = Annotated[str, typer.Option("--format", help="of images encoded again: keep, jpeg, png or webp")]
ValFraction = Annotated[float, typer.Option(help="part of the ids that goes to the split val")]
Seed = Annotated[int, typer.Option(help="decides what is held out")]
PerShard = Annotated[int, typer.Option(help="samples per shard")]
VocabSize = Annotated[int, typer.Option(help="of the tokenizer trained on the captions; 0: train none")]
Workers = Annotated[int | None, typer.Option(help="processes; default: one for each processor")]
Outside = Annotated[bool, typer.Option("--allow-outside", help="also read images outside the root")]
Root = Annotated[Path | None, typer.Option(help="what image paths are relative to; default: the table's folder")]
Captions = Annotated[
    list[str] | None, typer.Option("--caption", help="column of captions, or column=tag; may be given several times")
]


@prepare.command()
def glyphs(
    out: Out, seed: Seed = 0, size: Annotated[int, typer.Option(help="pixels of a side")] = 32, workers: Workers = None
) -> None:
    """The characters of matplotlib's fonts with their Unicode names: nothing to download, about half a minute."""
    _tell(prepare_glyphs(out, seed=seed, size=size, workers=workers))


@prepare.command()
def glyph_clips(
    out: Out,
    seed: Seed = 0,
    size: Annotated[int, typer.Option(help="pixels of a side")] = 32,
    frames: Annotated[int, typer.Option(help="of a clip")] = 8,
    workers: Workers = None,
) -> None:
    """Glyphs that move, grow or turn, with their names and motions: nothing to download, about two minutes."""
    _tell(prepare_glyph_clips(out, seed=seed, size=size, frames=frames, workers=workers))


@prepare.command()
def folder(
    source: Annotated[Path, typer.Argument(help="folder of images")],
    out: Out,
    captions: Annotated[
        str, typer.Option(help="sidecar: name.txt or name.json beside name.jpg; folder: the folder's name")
    ] = "sidecar",
    size: Size = None,
    image_format: ImageFormat = "keep",
    val_fraction: ValFraction = 0.05,
    seed: Seed = 0,
    samples_per_shard: PerShard = 4096,
    vocab_size: VocabSize = 8192,
    workers: Workers = None,
    allow_outside: Outside = False,
) -> None:
    """Images below a folder, with captions beside them or the folder names as captions."""
    if captions not in ("sidecar", "folder"):
        raise PairtileError(f"--captions is {captions!r}, expected sidecar or folder")
    options = _options(size, image_format, val_fraction, seed, samples_per_shard, vocab_size, workers)
    how = "folder" if captions == "folder" else "sidecar"
    _tell(prepare_folder(source, out, captions=how, allow_outside=allow_outside, options=options))  # type: ignore[arg-type]


@prepare.command()
def csv(
    source: Annotated[Path, typer.Argument(help="CSV or TSV file with a header")],
    out: Out,
    image: Annotated[str, typer.Option(help="column of image paths")] = "image",
    caption: Captions = None,
    id: Annotated[str | None, typer.Option(help="column of what is the same thing")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="column to keep as a label; may be given several times")
    ] = None,
    root: Root = None,
    delimiter: Annotated[str | None, typer.Option(help="default: comma, tab for .tsv")] = None,
    size: Size = None,
    image_format: ImageFormat = "keep",
    val_fraction: ValFraction = 0.05,
    seed: Seed = 0,
    samples_per_shard: PerShard = 4096,
    vocab_size: VocabSize = 8192,
    workers: Workers = None,
    allow_outside: Outside = False,
) -> None:
    """A table of image paths and captions."""
    options = _options(size, image_format, val_fraction, seed, samples_per_shard, vocab_size, workers)
    _tell(
        prepare_csv(
            source, out, image=image, captions=_columns(caption) or "caption", id=id, labels=label or (), root=root,
            delimiter=delimiter, allow_outside=allow_outside, options=options,
        )
    )  # fmt: skip


@prepare.command()
def jsonl(
    source: Annotated[Path, typer.Argument(help="file with one JSON object a line")],
    out: Out,
    image: Annotated[str, typer.Option(help="key of the image path")] = "image",
    caption: Captions = None,
    id: Annotated[str, typer.Option(help="key of what is the same thing")] = "id",
    root: Root = None,
    size: Size = None,
    image_format: ImageFormat = "keep",
    val_fraction: ValFraction = 0.05,
    seed: Seed = 0,
    samples_per_shard: PerShard = 4096,
    vocab_size: VocabSize = 8192,
    workers: Workers = None,
    allow_outside: Outside = False,
) -> None:
    """One JSON object a line with an image path and the fields of the sample schema."""
    options = _options(size, image_format, val_fraction, seed, samples_per_shard, vocab_size, workers)
    _tell(
        prepare_jsonl(
            source, out, image=image, captions=_columns(caption), id=id, root=root, allow_outside=allow_outside,
            options=options,
        )
    )  # fmt: skip


@prepare.command()
def webdataset(
    source: Annotated[list[str], typer.Argument(help="a folder of tars, or patterns with * and {000..123}")],
    out: Out,
    size: Size = None,
    image_format: ImageFormat = "keep",
    val_fraction: ValFraction = 0.05,
    seed: Seed = 0,
    samples_per_shard: PerShard = 4096,
    vocab_size: VocabSize = 8192,
    workers: Workers = None,
) -> None:
    """Tar shards from elsewhere, validated and written again."""
    options = _options(size, image_format, val_fraction, seed, samples_per_shard, vocab_size, workers)
    _tell(prepare_webdataset(source[0] if len(source) == 1 else source, out, options=options))


@prepare.command()
def tokenizer(
    source: Annotated[Path, typer.Argument(help="folder of shards")],
    out: Annotated[Path, typer.Option(help="a folder for tokenizer.json; name it in data.tokenizer")],
    train: Annotated[str, typer.Option(help="pattern of the training shards")] = "train-*.tar",
    tag: Annotated[
        list[str] | None, typer.Option(help="source or language to read; may be given several times; default: all")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="tokens")] = 8192,
) -> None:
    """A tokenizer trained on the captions of shards that come without one."""
    made = prepare_tokenizer(source, out, train=train, tags=tag, vocab_size=vocab_size)
    typer.echo(f"wrote {out}/tokenizer.json with {made.vocab_size:,} tokens")


def _options(
    size: int | None,
    image_format: str,
    val_fraction: float,
    seed: int,
    per_shard: int,
    vocab_size: int,
    workers: int | None,
) -> WriteOptions:
    return WriteOptions(
        size=size, format=cast(Format, image_format), val_fraction=val_fraction, seed=seed, samples_per_shard=per_shard,
        vocab_size=vocab_size, workers=workers,
    )  # fmt: skip


def _columns(given: list[str] | None) -> str | dict[str, str] | None:
    """``--caption title --caption text_de=de`` -> {"title": "title", "text_de": "de"}; a single plain column stays one."""
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    return {column: tag or column for column, _, tag in (entry.partition("=") for entry in given)}


def _tell(report: PrepareReport) -> None:
    if report.reused:
        typer.echo(f"{report.out} is complete already; nothing was done")
        return
    splits = ", ".join(f"{name} {count:,}" for name, count in report.splits.items())
    typer.echo(f"wrote {report.written:,} samples to {report.out} in {report.seconds:.0f} s: {splits}")
    if report.dropped:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(report.dropped.items()))
        typer.echo(f"left out {sum(report.dropped.values()):,} ({reasons}); listed in {report.dropped_file}")
