"""What a preparation did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class PrepareReport:
    """The outcome of one ``prepare_*`` call.

    Attributes:
        out: the folder with shards, tokenizer.json and dataset.json.
        written: samples in all splits. splits: samples in each.
        dropped: what was left out, counted by reason. dropped_file: one JSON object {source, reason, detail} a
            line; None when nothing was dropped.
        reused: True when a complete data set with the same settings was there and nothing was done.
        seconds: wall time.
    """

    out: Path
    written: int
    splits: dict[str, int]
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_file: Path | None = None
    reused: bool = False
    seconds: float = 0.0
