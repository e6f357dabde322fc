"""similarity_reduce and the losses over gloo processes, each start for several checks of ring_worker.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks

WORKER = Path(__file__).with_name("ring_worker.py")
CHECKS = {
    2: ["requests", "misuse", "once_only", "ties", "calm_blocks"],
    3: ["requests", "losses"],
    4: ["scopes", "traffic"],
}


@pytest.mark.parametrize("world", CHECKS)
def test_ranks(world):
    ranks.start(WORKER, world, *CHECKS[world])
