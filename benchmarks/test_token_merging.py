"""Matching and size-weighted merging beside ToMe's and PiToMe's formulations in PyTorch, on the CPU.

    pytest benchmarks -k token_merging

README.md beside this file explains the columns and lists the environment variables.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from . import token_merging as make
from .bars import Bar, faster_than
from .contrastive import eager
from .harness import Case, Result
from .test_contrastive import FLOAT32_AGREEMENT, ROUNDS, _size
from .work import Work

BATCH = _size("TOKEN_BATCH", 32)
WIDTH, METRIC_WIDTH = 768, 64
#: Of 18,000 energies some are equal but for float32's rounding, and are ranked either way: single tokens then change
#: places. Another matching would differ by 1.
RANKED_AGREEMENT = 0.1
STEPS = {"forward": make.forward, "forward + backward": make.forward_and_backward}


def work_of(name: str, step: str, sizes: dict[str, int]) -> Work:
    """Similarities once; tokens read and written once, in the backward too."""
    batch, tokens, r = sizes["batch"], sizes["tokens"], sizes["r"]
    pairs = tokens * tokens // 4 if name == "tome" else (tokens - 1) ** 2 + r * r
    moved = 4 * batch * ((2 * tokens - r) * WIDTH * list(STEPS).index(step) + (2 * tokens - r) * WIDTH)
    formula = "B N^2 C / 2" if name == "tome" else "2 B (N^2 + r^2) C"
    return Work(2 * batch * pairs * METRIC_WIDTH, moved + 4 * batch * tokens * METRIC_WIDTH, torch.float32, formula)


def leaner_beyond_results(name: str, share: float, result_bytes: int) -> Bar:
    """Our peak memory without the merged tokens and the gradient is at most this share of the other's without them."""

    def measure(result: Result) -> float:
        ours, theirs = (max(0, each - result_bytes) for each in (result.peak(), result.peak(name)))
        return ours / max(1, theirs)

    return Bar(f"<= 1/{1 / share:g} of {name}'s memory beyond results", measure, share, False, name, "{:.3f}")


def case_of(name: str, step: str, tokens: int, r: int, times: float, batch: int = BATCH, **changes: Any) -> Case:
    sizes = {"batch": batch, "tokens": tokens, "width": WIDTH, "metric_width": METRIC_WIDTH, "r": r}
    both = step != "forward"
    result_bytes = 4 * batch * WIDTH * (tokens - r + both * tokens)
    plain = partial(getattr(make, name), r=r)
    settings: dict[str, Any] = {
        "name": f"{name} N = {tokens}, {step}",
        "inputs": make.inputs,
        "sizes": sizes,
        "error_sizes": sizes | {"batch": 2},
        "small_sizes": sizes | {"batch": 1},
        "work": work_of(name, step, sizes),
        "contenders": make.contenders(name, r, STEPS[step]),
        "results": ("merged", "sizes", "dx")[: 3 if both else 2],
        "matrix_gradients": ("dx",) if both else (),
        "exact": partial(STEPS[step], partial(eager, plain)),
        "agreement": FLOAT32_AGREEMENT if name == "tome" else RANKED_AGREEMENT,
        "rounds": ROUNDS,
        "bars": (faster_than("eager", times), leaner_beyond_results("eager", 1 / 4, result_bytes)),
    }
    return Case(**settings | changes)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("name", "tokens", "r", "times"), [("tome", 197, 16, 3.0), ("tome", 1025, 16, 4.0), ("pitome", 577, 58, 4.0)]
)
def test_token_merging(measure_row, name, step, tokens, r, times):
    measure_row(case_of(name, step, tokens, r, times))
