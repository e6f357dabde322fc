"""One optimiser step of the trainer beside one of open_clip's, on the same model and batch, in one process.

pytest benchmarks -k trainer
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import trainer as make
from .bars import faster_than, leaner_than
from .harness import Case
from .test_contrastive import BFLOAT16_AGREEMENT, FLOAT32_AGREEMENT, ROUNDS, _size

BATCH = _size("TRAINER_BATCH", 256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def trainer_case(precision: str, batch: int, **changes: Any) -> Case:
    settings: dict[str, Any] = {
        "name": f"training step {precision}",
        "inputs": make.inputs,
        "sizes": {"batch": batch},
        "small_sizes": {"batch": 4},
        "work": make.work(batch, DTYPES[precision]),
        "contenders": make.contenders(precision),
        "results": ("value",),
        "matrix_gradients": (),
        # of the first step, from the same weights; the weights part afterwards
        "agreement": FLOAT32_AGREEMENT if precision == "fp32" else BFLOAT16_AGREEMENT,
        "bars": (faster_than("open_clip", 1.0), leaner_than("open_clip", 1.0)),
        "rounds": ROUNDS,
    }
    return Case(**settings | changes)


@pytest.mark.parametrize("precision", list(DTYPES))
def test_trainer(measure_row, precision):
    measure_row(trainer_case(precision, BATCH))
