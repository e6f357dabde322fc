"""The loss over two processes, one core each, beside open_clip's, on the CPU.

pytest benchmarks -k ranks
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from . import contrastive
from .bars import faster_than
from .harness import Case, forward_and_backward
from .over_ranks import INPUTS, contenders
from .test_contrastive import FLOAT32_AGREEMENT, ROUNDS, WIDTH, _size
from .work import Work, one_sweep_work

BATCH = _size("RANKS_BATCH", 8192)
WORLD = 2


def ranks_case(loss: str, batch: int, width: int, world: int) -> Case:
    """One step of a loss, all ranks together: the floor is that of the whole batch on all cores."""
    exact = contrastive.exact_clip if loss == "ClipLoss" else contrastive.exact_siglip
    work: Work = one_sweep_work(batch, batch, width, torch.float32)
    return Case(
        name=f"{loss} float32 on {world} ranks",
        inputs=INPUTS[loss],
        sizes={"batch": batch, "width": width},
        error_sizes={"batch": min(batch, 1024), "width": width},
        work=work,
        contenders=contenders(loss, world),
        results=("value", "dx", "dy", "dscale") + (("dbias",) if loss == "SigLipLoss" else ()),
        matrix_gradients=("dx", "dy"),
        agreement=FLOAT32_AGREEMENT,
        exact=partial(forward_and_backward, partial(contrastive.eager, exact)),
        bars=(faster_than("open_clip", 2.0),) if loss == "ClipLoss" else (),
        rounds=ROUNDS,
    )


@pytest.mark.parametrize("loss", ["ClipLoss", "SigLipLoss"])
def test_over_ranks(loss, measure_row):
    measure_row(ranks_case(loss, BATCH, WIDTH, WORLD))
