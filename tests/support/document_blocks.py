"""The Python blocks of a document, run as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def blocks(file: str | Path) -> list[tuple[int, str]]:
    """(line, code) of each block; the file relative to the root."""
    text = (ROOT / file).read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def run(file: str, names: dict[str, Any], chosen: Callable[[str], bool] = lambda code: True) -> dict[str, Any]:
    """Runs the chosen blocks one after the other in one namespace, which is returned."""
    wanted = [(line, code) for line, code in blocks(file) if chosen(code)]
    assert wanted, f"no Python block in {file}"
    for line, code in wanted:
        # so many empty lines that a traceback names the line of the document
        exec(compile("\n" * (line - 1) + code, str(ROOT / file), "exec"), names)
    return names
