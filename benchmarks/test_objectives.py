"""Every other loss beside the formula that it replaces, eager and compiled: forward + backward, on the CPU.

    pytest benchmarks/test_objectives.py -k "Triplet or Circle"

README.md beside this file explains the columns and lists the environment variables.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch

from . import objectives
from .bars import Bar, faster_than, leaner_than
from .harness import Case, forward_and_backward
from .work import Work


def _size(name: str, default: int) -> int:
    return int(os.environ.get(f"PAIRTILE_BENCH_{name}", default))


BATCH = _size("OBJECTIVES_BATCH", 4096)
WIDTH = _size("WIDTH", 512)
ROUNDS = _size("ROUNDS", 5)
#: Where the dense formula in float64, with its teachers and queues, holds half a GB.
ERROR_BATCH = 1024


def work_of(row: objectives.Row, batch: int, width: int) -> Work:
    """All tiles made twice, once for the sums and once for the weights: no more is kept than the budget allows."""
    student = row.passes * row.products * batch * batch * width
    teachers = (2 if row.passes == 2 else 4) * batch * batch * row.teacher_width
    formula = f"{row.passes * row.products:g} N M D" + (f" + 4 N M {row.teacher_width}" if row.teacher_width else "")
    return Work(student + teachers, 8 * (batch * 4 * width), torch.float32, formula)


def bars_of(name: str) -> tuple[Bar, ...]:
    if name == "DistillClipLoss 2 teachers":
        return (faster_than("open_clip", 2.5),)
    lean = objectives.LEAN
    usual = (
        faster_than("dense", 2.0),
        faster_than("dense (compiled)", 1.3),
        leaner_than("dense", 1 / 8),
        faster_than("dense", 2.0, lean),
        leaner_than("dense", 1 / 8, lean),
    )
    return (faster_than("four calls", 1.5), *usual) if name == "MatryoshkaLoss" else usual


def case_of(name: str, batch: int, width: int, **changes: Any) -> Case:
    row = objectives.rows()[name]
    wanted = sum(leaf.requires_grad for leaf in objectives.inputs(2, max(objectives.WIDTHS[0], 2), name=name))
    settings: dict[str, Any] = {
        "name": f"{name}, float32",
        "inputs": partial(objectives.inputs, name=name),
        "sizes": {"batch": batch, "width": width},
        "error_sizes": {"batch": min(batch, ERROR_BATCH), "width": width},
        "small_sizes": {"batch": 64, "width": width},
        "work": work_of(row, batch, width),
        "results": ("value", "dx", "dy", "dscale", "dbias")[: 1 + wanted],
        "matrix_gradients": ("dx", "dy"),
        "exact": partial(forward_and_backward, partial(objectives.dense, name)),
        "agreement": row.agreement,
        "rounds": ROUNDS,
        "contenders": objectives.contenders(name),
        "bars": bars_of(name),
    }
    return Case(**settings | changes)


@pytest.mark.parametrize("name", list(objectives.rows()))
def test_objective(measure_row, name):
    measure_row(case_of(name, BATCH, WIDTH))
