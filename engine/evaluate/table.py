"""Results for people (a table in the terminal or in Markdown) and for programs (JSON)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import PairtileError
from .retrieval import RetrievalMetrics
from .run import SplitResult

FORMAT = "pairtile.evaluation"
VERSION = 1

RETRIEVAL_HEAD = (
    "split",
    "direction",
    "R@1",
    "R@5",
    "R@10",
    "median\nrank",
    "queries",
    "candi-\ndates",
    "id-only R@1\n/ ceiling",
)
CLASSIFICATION_HEAD = (
    "split",
    "label",
    "top-1",
    "top-5",
    "mean per\nclass",
    "commonest\nclass",
    "classes",
    "samples",
)


@dataclass(frozen=True)
class _Grid:
    """A table as strings, whatever draws it."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def retrieval_rows(results: Sequence[SplitResult]) -> list[tuple[str, ...]]:
    """Two rows per split or part of one, text to image first, as strings below ``RETRIEVAL_HEAD``."""
    rows = []
    for result in results:
        for name, subset in result.subsets.items():
            for direction in ("text_to_image", "image_to_text"):
                id_only = ""
                if subset.id_only is not None and subset.id_ceiling is not None:
                    strict: RetrievalMetrics = getattr(subset.id_only, direction)
                    id_only = f"{strict.recall_at_1:.1%}/{getattr(subset.id_ceiling, direction):.1%}"
                rows.append((name, direction.replace("_to_", "→"), *_recalls(getattr(subset, direction)), id_only))
    return rows


def classification_rows(results: Sequence[SplitResult]) -> list[tuple[str, ...]]:
    """One row per classified split, as strings below ``CLASSIFICATION_HEAD``."""
    rows = []
    for result in results:
        found = result.classification
        if found is not None:
            accuracies = (found.top1, found.top5, found.mean_per_class, found.majority)
            counts = (f"{len(found.per_class)}", f"{found.samples:,}")
            rows.append((result.split, found.label, *(f"{value:.1%}" for value in accuracies), *counts))
    return rows


def notes(results: Sequence[SplitResult]) -> list[str]:
    """What a reader must know beside the figures: samples that could not be read, queries without an answer."""
    lines = []
    for result in results:
        if result.scores != "pooled":
            which = (
                "of all pairs" if result.rerank_top is None else f"of the {result.rerank_top} best by pooled embeddings"
            )
            lines.append(f"{result.split}: scored by late interaction {which}")
        if result.skipped:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(result.skipped.items()))
            lines.append(f"{result.split}: {sum(result.skipped.values())} samples skipped ({reasons})")
        for name, subset in result.subsets.items():
            excluded = subset.image_to_text.excluded, subset.text_to_image.excluded
            if any(excluded):
                lines.append(
                    f"{name}: without any correct answer and left out: {excluded[0]} images, {excluded[1]} captions"
                )
        if result.ambiguous_captions:
            lines.append(
                f"{result.split}: {result.ambiguous_captions} captions also belong to another id; they count as ties"
            )
    return lines


def print_results(results: Sequence[SplitResult], console: Console | None = None) -> None:
    """Prints the tables and the notes with rich."""
    # Away from a terminal rich assumes 80 columns; a log has room for whole names.
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    for grid in _grids(results):
        table = Table(
            title=grid.title,
            title_justify="left",
            header_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            padding=(0, 1) if console.width >= 100 else (0, 0),
        )
        # On a narrow terminal only the split's name is broken: a broken figure cannot be read.
        table.add_column(grid.head[0], overflow="fold", min_width=12)
        for column, heading in enumerate(grid.head[1:]):
            table.add_column(heading, justify="left" if column == 0 else "right", no_wrap=True)
        for row in grid.rows:
            # Text and not str: a split's name may hold square brackets, which rich reads as markup.
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for note in notes(results):
        console.print(Text(note, style="dim"))


def to_markdown(results: Sequence[SplitResult]) -> str:
    """The same tables and notes in Markdown."""
    parts = []
    for grid in _grids(results):
        head = [heading.replace("-\n", "").replace("\n", " ") for heading in grid.head]
        lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *grid.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append(f"**{grid.title}**\n\n{table}")
    parts += [f"- {note}" for note in notes(results)]
    return "\n\n".join(parts) + "\n"


def write_json(path: Path, results: Sequence[SplitResult], **about: Any) -> None:
    """Writes ``{"format", "version", "about", "splits": {name: SplitResult}}``; the file appears whole or not at all.

    Args:
        path: the file; its folder is created.
        results: one per split.
        about: JSON values stored beside the results, such as the run's folder and step.

    Raises:
        PairtileError: the file cannot be written.
    """
    splits = {result.split: json.loads(result.model_dump_json()) for result in results}
    text = json.dumps({"format": FORMAT, "version": VERSION, "about": about, "splits": splits}, indent=2)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise PairtileError(f"cannot write results to {path}: {error}; choose a folder you can write to") from None


def read_json(path: Path) -> dict[str, SplitResult]:
    """The splits of a file of :func:`write_json`.

    Raises:
        PairtileError: not such a file, or of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PairtileError(
            f"cannot read results from {path}: {error}; expected a file of `pairtile evaluate`"
        ) from None
    found = (content.get("format"), content.get("version")) if isinstance(content, dict) else None
    if found != (FORMAT, VERSION):
        raise PairtileError(f"{path} is not a result file of format {FORMAT} version {VERSION}, found {found}")
    return {name: SplitResult.model_validate(split) for name, split in content["splits"].items()}


def _grids(results: Sequence[SplitResult]) -> list[_Grid]:
    retrieval = _Grid("Zero-shot retrieval", RETRIEVAL_HEAD, retrieval_rows(results))
    if not any(row[-1] for row in retrieval.rows):
        retrieval = _Grid(retrieval.title, RETRIEVAL_HEAD[:-1], [row[:-1] for row in retrieval.rows])
    grids = [retrieval]
    if classified := classification_rows(results):
        grids.append(_Grid("Zero-shot classification", CLASSIFICATION_HEAD, classified))
    return grids


def _recalls(metrics: RetrievalMetrics) -> tuple[str, ...]:
    recalls = (metrics.recall_at_1, metrics.recall_at_5, metrics.recall_at_10)
    counts = (f"{metrics.median_rank:g}", f"{metrics.queries:,}", f"{metrics.candidates:,}")
    return (*(f"{recall:.1%}" for recall in recalls), *counts)
