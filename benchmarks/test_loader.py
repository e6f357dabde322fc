"""The data loader: shards to batches of tensors on one core, beside webdataset.

pytest benchmarks -k loader
"""

from __future__ import annotations

from typing import Any

from . import loader as make
from .bars import faster_than_best
from .harness import Case
from .test_contrastive import ROUNDS, _size

SAMPLES = _size("LOADER_SAMPLES", 512)
#: Pixels on a side, as stored and as trained on.
STORED, SIDE = 256, 224
#: Decoders and resizers round pixels in their own ways: half a grey level of 128.
AGREEMENT = 5e-3


def loader_case(samples: int, stored: int, side: int, **changes: Any) -> Case:
    sizes = {"samples": samples, "stored": stored, "side": side}
    settings: dict[str, Any] = {
        "name": "loader, JPEG on one core",
        "inputs": make.inputs,
        "sizes": sizes,
        "work": make.work(**sizes),
        "contenders": make.contenders(),
        "results": ("samples", "pixels", "ids"),
        "matrix_gradients": (),
        "agreement": AGREEMENT,
        "bars": (faster_than_best([each.name for each in make.contenders() if not each.ours], 1.0),),
        "rounds": ROUNDS,
    }
    return Case(**settings | changes)


def test_loader(measure_row):
    measure_row(loader_case(SAMPLES, STORED, SIDE))
