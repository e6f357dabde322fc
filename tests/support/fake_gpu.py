"""The GPU benchmarks' device without a GPU, contenders that do what a test says, and rows of no size.

Imports the folder benchmarks/ as the package of that name.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _load_benchmarks() -> None:
    """The folder as the package `benchmarks`, without the root on sys.path."""
    if "benchmarks" in sys.modules:
        return
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])


_load_benchmarks()

from benchmarks.gpu import contenders, rows  # noqa: E402
from benchmarks.harness import Contender  # noqa: E402

#: The compiler takes its time, also for small sizes.
EAGER = {"without": ("torch.compile",), "shapes": ((8, 8, 8),)}


class FakeDevice:
    """The CPU with a clock of its own: each timed call takes 10 ms, every third one 20 ms."""

    name, title = "cpu", "made-up device"

    def __init__(self):
        self.now, self.calls, self.rehearsals = 0.0, 0, 0
        self.lost = False

    def clock(self):
        return self.now

    def synchronize(self):
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def free(self):
        self.synchronize()

    def seconds(self, call, calls=1):
        call()
        self.synchronize()
        self.calls += 1
        took = 0.02 if self.calls % 3 == 0 else 0.01
        self.now += took
        return took

    def host_seconds(self, call):
        return 0.001

    def peak_bytes(self, call):
        return 10**6

    def large(self, peak):
        return peak > 10**6

    def product_seconds(self, m, n, k, dtype):
        return 2 * m * n * k / 1e14

    def copy_rate(self):
        return 1e12


TINY = {
    "clip": partial(rows.clip, 20, 16),
    "clip forward": partial(rows.clip_forward, 20, 16),
    "clip ieee": partial(rows.clip_float32, 20, 16, "ieee"),
    "clip tf32": partial(rows.clip_float32, 20, 16, "tf32"),
    "clip tf32x3": partial(rows.clip_float32, 20, 16, "tf32x3"),
    "siglip": partial(rows.siglip, 20, 16),
    "linear_cross_entropy": partial(rows.linear_cross_entropy, 20, 40, 16),
    "maxsim": partial(rows.maxsim, 2, 5, 3, 20, 16),
    "colbert": partial(rows.colbert, 3, 5, 20, 16),
    "filip": partial(rows.filip, 3, 6, 5, 16),
    "tome": partial(rows.tome, 2, 9, 3, 16, 8),
}


def contender(name, change=lambda results: results, *, ours=False, prepare_error=None):
    """Eager PyTorch whose results `change` changes, or who raises."""

    def prepare(leaves):
        if prepare_error:
            raise prepare_error
        call = contenders.training_step(lambda: contenders.mixed_clip, leaves)
        return lambda: change(call())

    return Contender(name, prepare, ours=ours)


def raising(error):
    def change(results):
        raise error

    return change


def clip_of(*others, ours=None):
    ours = ours or (contender("ours", ours=True),)
    return rows.clip(8, 16, contenders=(*ours, *others), exact=None)
