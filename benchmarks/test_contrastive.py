"""ClipLoss and SigLipLoss against open_clip's: forward + backward, float32, time and peak memory.

    OMP_NUM_THREADS=2 pytest benchmarks/test_contrastive.py

PAIRTILE_BENCH_BATCH (8192), PAIRTILE_BENCH_WIDTH (512) and PAIRTILE_BENCH_ROUNDS (5) set the size; the memory bar is
asserted from a batch of 4096 on, below which fixed costs decide.
"""

from __future__ import annotations

import os

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from pairtile.kernels import ClipLoss, SigLipLoss

from .harness import interleaved, medians, peak_memory

BATCH = int(os.environ.get("PAIRTILE_BENCH_BATCH", "8192"))
WIDTH = int(os.environ.get("PAIRTILE_BENCH_WIDTH", "512"))
ROUNDS = int(os.environ.get("PAIRTILE_BENCH_ROUNDS", "5"))

LOSSES = {"ClipLoss": (ClipLoss, open_clip.loss.ClipLoss), "SigLipLoss": (SigLipLoss, open_clip.loss.SigLipLoss)}


def step(loss: torch.nn.Module, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def inputs(batch: int, width: int) -> list[torch.Tensor]:
    """Image and text embeddings, scale and bias."""
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(batch, width, generator=generator), dim=-1) for _ in range(2)]
    return [each.requires_grad_() for each in (*features, torch.tensor(14.3), torch.tensor([-10.0]))]


MEMORY = """
import torch, torch.nn.functional as F
from {module} import {name}

def make(batch, width):
    x, y = (F.normalize(torch.randn(batch, width), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(14.3, requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    return lambda: {name}()(x, y, scale, bias).backward()

small, large = make(64, {width}), make({batch}, {width})
"""


def assert_agreement(ours: torch.nn.Module, theirs: torch.nn.Module, leaves: list[torch.Tensor]) -> None:
    """The tests hold both to float64; here it is enough that the two compute one function."""
    for given, expected in zip(step(ours, leaves)[:4], step(theirs, leaves)[:4]):
        assert (given - expected).norm() <= 1e-4 * expected.norm().clamp(min=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward(benchmark, name):
    ours, theirs = (make() for make in LOSSES[name])
    leaves = inputs(BATCH, WIDTH)
    assert_agreement(ours, theirs, leaves)

    contenders = {"pairtile": lambda: step(ours, leaves), "open_clip": lambda: step(theirs, leaves)}
    seconds = interleaved(contenders, ROUNDS)
    middle = medians(seconds)
    memory = {
        "pairtile": peak_memory(MEMORY.format(module="pairtile.kernels", name=name, batch=BATCH, width=WIDTH)),
        "open_clip": peak_memory(MEMORY.format(module="open_clip.loss", name=name, batch=BATCH, width=WIDTH)),
    }
    benchmark.extra_info |= {
        "batch": BATCH,
        "width": WIDTH,
        "threads": torch.get_num_threads(),
        "interleaved_seconds": seconds,
        "times_as_fast": middle["open_clip"] / middle["pairtile"],
        "peak_bytes": memory,
    }
    benchmark.pedantic(contenders["pairtile"], rounds=ROUNDS)
    print(
        f"\n{name} B={BATCH} D={WIDTH}: {middle['pairtile']:.3f} s, {memory['pairtile'] / 1e6:.0f} MB; "
        f"open_clip {middle['open_clip']:.3f} s, {memory['open_clip'] / 1e6:.0f} MB"
    )
    if BATCH >= 4096:
        assert memory["pairtile"] < memory["open_clip"] / 10
