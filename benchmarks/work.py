"""What a row has to do at least: the FLOPs of the algorithm chosen and the bytes that must move."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Work:
    """The work of one call.

    Attributes:
        flops: of the algorithm chosen, matrix products alone.
        least_bytes: every input read once, every gradient written once.
        dtype: of the products' operands; its rate makes the floor.
        formula: how `flops` comes about, for the reader of the table.
        read_only: nothing of a size is written, so that the bytes move at the rate of reading.
    """

    flops: float
    least_bytes: float
    dtype: torch.dtype
    formula: str
    read_only: bool = False


def kept_share(n: int, m: int, budget: int) -> float:
    """Share of the n x m scores that a memory budget of `budget` bytes keeps from forward to backward.

    Chunk by chunk of rows, in float32, in what the panels leave of the budget (csrc/cpu/problem.cpp).
    """
    rows = min(256, max(32, -(-n // 128) * 16))
    chunks = -(-n // rows)
    fitting = (budget - min(budget // 4, 14 * 2**20)) // (4 * rows * max(16, -(-m // 16) * 16))
    return min(chunks, fitting) / chunks


def symmetric_work(n: int, m: int, d: int, dtype: torch.dtype, budget: int) -> Work:
    """A softmax along rows and along columns: the backward needs both sums, so it makes again what was not kept.

    One product forward, dx and dy backward, and a second product for the tiles that are made again.
    """
    again = 1 - kept_share(n, m, budget)
    return Work(
        flops=(6 + 2 * again) * n * m * d,
        least_bytes=_inputs_and_gradients(n, m, d, dtype),
        dtype=dtype,
        formula=f"{6 + 2 * again:.2f} N M D",
    )


def one_sweep_work(n: int, m: int, d: int, dtype: torch.dtype) -> Work:
    """A loss whose gradient is known block row by block row (sigmoid, one direction): S, dx and dy, once each."""
    return Work(6 * n * m * d, _inputs_and_gradients(n, m, d, dtype), dtype, "6 N M D")


def _inputs_and_gradients(n: int, m: int, d: int, dtype: torch.dtype) -> float:
    return 2 * (n + m) * d * dtype.itemsize
