"""Reading what a run wrote, and starting one the ways people do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m", "pairtile.engine.train"]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def environment(**more: str) -> dict[str, str]:
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    return {**clean, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def run(command: list[str], *, timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(**more), capture_output=True, text=True, timeout=timeout, cwd=ROOT.parent
    )
