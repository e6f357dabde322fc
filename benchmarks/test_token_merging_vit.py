"""One timm ViT-B/16 without merging, with ours, and with ToMe's formulation in PyTorch: images a second, on the CPU.

    pytest benchmarks -k vit

README.md beside this file explains the columns and lists the environment variables.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from . import token_merging_vit as make
from .bars import Bar
from .harness import Case, Result
from .test_contrastive import BFLOAT16_AGREEMENT, FLOAT32_AGREEMENT, ROUNDS, _size
from .work import Work

BATCH = _size("VIT_BATCH", 16)
PIXELS = 224
#: In bfloat16 similarities are rounded differently, and a pair that is taken for another changes what follows.
AGREEMENT = {torch.float32: FLOAT32_AGREEMENT, torch.bfloat16: 2 * BFLOAT16_AGREEMENT}


def share_of_saving(r: int) -> Bar:
    """Our speed over what it would be if time fell as FLOPs do: unmerged images a second times the ratio of FLOPs."""
    saving = make.flops(1, PIXELS, 0) / make.flops(1, PIXELS, r)
    return Bar(
        text=f">= 90% of the {saving:.2f}x that FLOPs allow",
        measure=lambda result: result.median(make.UNMERGED) / result.median() / saving,
        limit=0.9,
        at_least=True,
        beside=make.UNMERGED,
        shown="{:.0%}",
    )


def case_of(dtype: torch.dtype, r: int, batch: int = BATCH, rounds: int = ROUNDS) -> Case:
    name = str(dtype).removeprefix("torch.")
    images = batch * 3 * PIXELS**2 * dtype.itemsize
    return Case(
        name=f"ViT-B/16 {name}, r = {r}",
        inputs=partial(make.inputs, dtype=dtype),
        sizes={"batch": batch, "pixels": PIXELS},
        work=Work(make.flops(batch, PIXELS, r), images, dtype, "merged ViT-B/16"),
        contenders=make.contenders(r),
        results=("logits",),
        matrix_gradients=(),
        agreement=AGREEMENT[dtype],
        rounds=rounds,
        bars=(share_of_saving(r),),
    )


def images_per_second(result: Result) -> dict[str, float]:
    return {name: result.case.sizes["batch"] / each.median for name, each in result.measured.items()}


@pytest.mark.parametrize("r", [8, 13, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_vit(measure_row, benchmark, dtype, r):
    result = measure_row(case_of(dtype, r))
    rates = images_per_second(result)
    benchmark.extra_info["images_per_second"] = rates
    result.remarks.append("images/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
