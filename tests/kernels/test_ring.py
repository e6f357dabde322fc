"""similarity_reduce and the losses over gloo processes: all requests, scopes, traffic, and what breaks them."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks

WORKER = Path(__file__).with_name("ring_worker.py")


@pytest.mark.parametrize("world", [2, 3])
def test_random_requests_over_ranks_equal_one_process(world):
    ranks.start(WORKER, world, "requests")
