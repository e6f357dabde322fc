"""The losses beside open_clip's and plain PyTorch's: forward + backward, on the CPU.

    pytest benchmarks -k "clip and not sizes"

README.md beside this file explains the columns and lists the environment variables.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch

from pairtile.kernels.contrastive.operator import DEFAULT_MEMORY_BUDGET

from . import contrastive as make
from .bars import faster_than, faster_than_best, leaner_than, peak_below, share_of_floor
from .harness import Case, Contender, forward_and_backward, in_float32
from .selection import FULL
from .work import one_sweep_work, symmetric_work


def _size(name: str, default: int) -> int:
    return int(os.environ.get(f"PAIRTILE_BENCH_{name}", default))


BATCH = _size("BATCH", 8192)
LARGE_BATCH = _size("LARGE_BATCH", 32768)
WIDTH = _size("WIDTH", 512)
TOKENS = _size("TOKENS", 4096)
VOCABULARY = _size("VOCABULARY", 50_000)
ROUNDS = _size("ROUNDS", 7 if FULL else 5)
BATCHES = [int(each) for each in os.environ.get("PAIRTILE_BENCH_BATCHES", "256,1024,4096").split(",")]
SMALL_ROUNDS = _size("SMALL_ROUNDS", 30)
SMALL = [
    tuple(int(part) for part in size.split("x"))
    for size in os.environ.get(
        "PAIRTILE_BENCH_SMALL", ",".join(f"{b}x{d}" for b in (64, 256, 1024) for d in (64, 100, 768, 2048))
    ).split(",")
]

#: The dense formula in float64 holds half a dozen matrices of batch^2 elements: 3 GB at 8192, 0.2 GB here.
ERROR_BATCH = 2048
#: Of 50,000 x 8 bytes per token and matrix.
ERROR_TOKENS = 256

#: float32: logits up to 30 carry a rounding error of 2e-6, the gradients that pass through exp ten times as much.
FLOAT32_AGREEMENT = 1e-4
#: bfloat16: the dense form rounds each logit to 8 bits, 0.02 of logits around 4.
BFLOAT16_AGREEMENT = 5e-2

CLIP: dict[str, Any] = {"results": ("value", "dx", "dy", "dscale"), "matrix_gradients": ("dx", "dy")}
SIGLIP: dict[str, Any] = {"results": ("value", "dx", "dy", "dscale", "dbias"), "matrix_gradients": ("dx", "dy")}
DENSE_CLIP = partial(forward_and_backward, partial(make.eager, make.exact_clip))
DENSE_SIGLIP = partial(forward_and_backward, partial(make.eager, make.exact_siglip))
DENSE_CROSS_ENTROPY = partial(forward_and_backward, partial(make.eager, make.linear_then_cross_entropy))


def clip_case(batch: int, width: int, scale: float = 14.3, **changes: Any) -> Case:
    at_scale = "" if scale == 14.3 else f", scale {scale:g}"
    settings: dict[str, Any] = {
        "name": f"ClipLoss float32{at_scale}",
        "inputs": partial(make.clip_inputs, scale=scale),
        "sizes": {"batch": batch, "width": width},
        "error_sizes": {"batch": min(batch, ERROR_BATCH), "width": width},
        "small_sizes": {"batch": 64, "width": width},
        "work": symmetric_work(batch, batch, width, torch.float32, DEFAULT_MEMORY_BUDGET),
        "exact": DENSE_CLIP,
        "agreement": FLOAT32_AGREEMENT,
        "rounds": ROUNDS,
        "contenders": (
            *make.ours("ClipLoss", "cpp", "torch"),
            make.open_clip("ClipLoss"),
            *make.plain("one product", make.one_product_clip),
        ),
        **CLIP,
    }
    return Case(**settings | changes)


def siglip_case(batch: int, width: int, **changes: Any) -> Case:
    settings: dict[str, Any] = {
        "name": "SigLipLoss float32",
        "inputs": make.siglip_inputs,
        "work": one_sweep_work(batch, batch, width, torch.float32),
        "exact": DENSE_SIGLIP,
        "contenders": (
            *make.ours("SigLipLoss", "cpp", "torch"),
            make.open_clip("SigLipLoss"),
            *make.plain("without labels", make.lean_siglip),
        ),
        **SIGLIP,
    }
    return clip_case(batch, width, **settings | changes)


def clip_bf16_case(batch: int, width: int, **changes: Any) -> Case:
    float32 = make.open_clip("ClipLoss")
    settings: dict[str, Any] = {
        "name": "ClipLoss bfloat16",
        "inputs": partial(make.clip_inputs, dtype=torch.bfloat16),
        "work": symmetric_work(batch, batch, width, torch.bfloat16, DEFAULT_MEMORY_BUDGET),
        "agreement": BFLOAT16_AGREEMENT,
        "contenders": (
            *make.ours("ClipLoss", "cpp", "torch"),
            *make.plain("bf16 product", make.mixed_clip),
            Contender("open_clip float32", partial(in_float32, float32.prepare), missing=float32.missing),
        ),
    }
    return clip_case(batch, width, **settings | changes)


def linear_cross_entropy_case(tokens: int, vocabulary: int, width: int, **changes: Any) -> Case:
    settings: dict[str, Any] = {
        "name": "linear_cross_entropy float32",
        "inputs": make.language_model_inputs,
        "sizes": {"tokens": tokens, "vocabulary": vocabulary, "width": width},
        "error_sizes": {"tokens": min(tokens, ERROR_TOKENS), "vocabulary": vocabulary, "width": width},
        "small_sizes": {"tokens": 64, "vocabulary": 64, "width": width},
        "work": one_sweep_work(tokens, vocabulary, width, torch.float32),
        "results": ("value", "dhidden", "dvocabulary"),
        "matrix_gradients": ("dhidden", "dvocabulary"),
        "exact": DENSE_CROSS_ENTROPY,
        "agreement": FLOAT32_AGREEMENT,
        "rounds": ROUNDS,
        "contenders": (
            *make.ours("linear_cross_entropy", "cpp", "torch"),
            *make.plain("F.cross_entropy(F.linear)", make.linear_then_cross_entropy),
        ),
    }
    return Case(**settings | changes)


def test_clip(measure_row):
    bars = (
        share_of_floor(0.75),
        faster_than("open_clip", 3.0),
        leaner_than("open_clip", 1 / 8),
        faster_than("one product (compiled)", 1.6),
    )
    measure_row(clip_case(BATCH, WIDTH, bars=bars))


def test_clip_at_scale_100(measure_row):
    measure_row(clip_case(BATCH, WIDTH, scale=100.0, bars=(share_of_floor(0.75),)))


def test_clip_large_batch(measure_row):
    """Ours alone: open_clip's logits and their gradients would be 16 GB. One round, 10 to 30 s a call."""
    contenders = [each for each in make.ours("ClipLoss", "cpp", "torch") if each.missing is None][:1]
    bars = (share_of_floor(0.75), peak_below(2**30))
    measure_row(clip_case(LARGE_BATCH, WIDTH, contenders=contenders, exact=None, bars=bars, rounds=1))


def test_clip_bf16(measure_row):
    bars = (faster_than("bf16 product", 2.2), faster_than("open_clip float32", 6.0))
    measure_row(clip_bf16_case(BATCH, WIDTH, bars=bars))


def test_siglip(measure_row):
    bars = (share_of_floor(0.75), faster_than("open_clip", 3.0), leaner_than("open_clip", 1 / 10))
    measure_row(siglip_case(BATCH, WIDTH, bars=bars))


def test_linear_cross_entropy(measure_row):
    plain = "F.cross_entropy(F.linear)"
    bars = (share_of_floor(0.75), faster_than(plain, 1.8), leaner_than(plain, 1 / 10))
    case = linear_cross_entropy_case(TOKENS, VOCABULARY, WIDTH, bars=bars)
    absent = [each.missing for each in case.contenders if each.ours]
    if all(absent):
        pytest.skip(absent[0])
    measure_row(case)


@pytest.mark.parametrize("batch", BATCHES)
def test_clip_batches(measure_row, batch):
    """How time and memory grow with the batch, together with the rows above at this width."""
    measure_row(clip_case(batch, WIDTH, rounds=SMALL_ROUNDS if batch <= 1024 else ROUNDS))


def small(case: Case) -> dict[str, Any]:
    """What differs in a small row: only the first of ours, more rounds, no memory runs, one bar."""
    first = next(each for each in case.contenders if each.ours and each.missing is None)
    others = [each for each in case.contenders if not each.ours]
    best = faster_than_best([each.name for each in others if each.missing is None], 0.9)
    return {"contenders": (first, *others), "rounds": SMALL_ROUNDS, "small_sizes": None, "bars": (best,)}


@pytest.mark.parametrize(("batch", "width"), SMALL)
def test_clip_sizes(measure_row, batch, width):
    measure_row(clip_case(batch, width, **small(clip_case(batch, width))))


@pytest.mark.parametrize(("batch", "width"), SMALL)
def test_siglip_sizes(measure_row, batch, width):
    measure_row(siglip_case(batch, width, **small(siglip_case(batch, width))))
