"""An account of the bytes that this process sends to the other ranks, kept where they are sent.

What a collective is counted as, for W ranks and tensors of b bytes (what a rank puts in; the padded size, where shards
are padded to the longest):

    all-gather       (W - 1) b      every other rank receives this rank's part
    reduce-scatter   (W - 1) b / W  for each other rank its part of the sum, b being the whole
    all-reduce       2 (W - 1) ceil(n / W) itemsize, of n numbers: a reduce-scatter and an all-gather of parts
    send             b

The algorithms of gloo and NCCL may route more bytes over a link, but none delivers with fewer in total.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_open: list[Traffic] = []


class Traffic:
    """Bytes sent by this process, by purpose.

    Attributes:
        sent: purpose -> bytes. "agreement" (sizes and dtypes, a few numbers a call), "features", "metadata" (ids, biases
            and what else belongs to a column), "statistics" (of travelling columns), "upstream" (gradients of their
            results), "gradients" (of features and column biases), "value" (of the loss).
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.sent.total()


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what is sent inside the block, forward and backward, by any thread of this process.

    Example::

        with count_traffic() as traffic:
            loss_function(images, texts, scale).backward()
        print(traffic.total, dict(traffic.sent))
    """
    traffic = Traffic()
    _open.append(traffic)
    try:
        yield traffic
    finally:
        _open.remove(traffic)


def record(purpose: str, sent: int) -> None:
    """Add to every account that is open."""
    for traffic in _open:
        traffic.sent[purpose] += sent


def record_all_reduce(purpose: str, tensor: Tensor, world_size: int) -> None:
    record(purpose, 2 * (world_size - 1) * math.ceil(tensor.numel() / world_size) * tensor.element_size())
