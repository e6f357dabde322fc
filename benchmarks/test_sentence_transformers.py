"""Training steps of sentence-transformers' ranking losses, with and without ours in them, on the CPU.

    pytest benchmarks -k sentence

A step embeds the texts too, the cached losses twice, in mini-batches; the encoder is a mean of token embeddings.
The floor is that of the loss alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from pairtile.kernels.contrastive.operator import DEFAULT_MEMORY_BUDGET

from . import contrastive
from . import sentence_transformers as make
from .bars import Bar, faster_than, leaner_than
from .harness import Case, Result, forward_and_backward
from .peers import missing_peer
from .test_contrastive import FLOAT32_AGREEMENT, ROUNDS, WIDTH, _size
from .work import one_sweep_work

PAIRS = _size("PAIRS", 4096)
MINI_BATCH = 64
THEIRS = "sentence-transformers"

#: The dense formula in float64 holds half a dozen matrices of batch^2 elements.
ERROR_BATCH = 1024


def ranking_case(batch: int, width: int, kind: str, mini_batch_size: int | None = None, **changes: Any) -> Case:
    """Pairs alone, or with `negatives` hard negatives for each query."""
    negatives = changes.pop("negatives", 0)
    sizes = {"batch": batch, "width": width, "negatives": negatives}
    chunks = f", mini-batches of {mini_batch_size}" if mini_batch_size else ""
    columns = f", {negatives} hard negatives" if negatives else ""
    settings: dict[str, Any] = {
        "name": f"{kind} float32{chunks}{columns}",
        "inputs": make.text_inputs,
        "sizes": sizes,
        "error_sizes": sizes | {"batch": min(batch, ERROR_BATCH)},
        "small_sizes": sizes | {"batch": 128},
        "work": one_sweep_work(batch, batch * (1 + negatives), width, torch.float32),
        "results": ("value", "dtable"),
        "matrix_gradients": ("dtable",),
        "exact": partial(forward_and_backward, partial(contrastive.eager, make.exact_ranking)),
        "agreement": FLOAT32_AGREEMENT,
        "rounds": ROUNDS,
        "contenders": make.contenders(kind, mini_batch_size),
    }
    return Case(**settings | changes)


def _memory_beyond_theirs(limit: int) -> Bar:
    def measure(result: Result) -> float:
        return (result.peak() - result.peak(THEIRS)) / 2**20

    return Bar(f"<= {THEIRS}'s memory + {limit / 2**20:.0f} MiB", measure, limit / 2**20, False, THEIRS, "{:+.0f} MiB")


@pytest.fixture
def measure_step(measure_row):
    def measure(case: Case) -> Result:
        if (absent := missing_peer(THEIRS)) is not None:
            pytest.skip(f"{THEIRS} is {absent}")
        return measure_row(case)

    return measure


@pytest.mark.parametrize("negatives", [0, 2])
def test_cached_sentence_transformers(measure_step, negatives):
    bars = (faster_than(THEIRS, 1.0), _memory_beyond_theirs(DEFAULT_MEMORY_BUDGET))
    kind = "CachedMultipleNegativesRankingLoss"
    measure_step(ranking_case(PAIRS, WIDTH, kind, MINI_BATCH, negatives=negatives, bars=bars))


def test_sentence_transformers(measure_step):
    bars = (faster_than(THEIRS, 1.0), leaner_than(THEIRS, 1 / 2))
    measure_step(ranking_case(PAIRS, WIDTH, "MultipleNegativesRankingLoss", bars=bars))
