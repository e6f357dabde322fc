"""Which tile, how many warps and how many stages the kernels of late interaction get: plain functions, nothing is timed."""

from __future__ import annotations

import torch

from ..contrastive.triton_kernels.configurations import Config, narrowed, offered

#: The kernels that multiply.
KERNELS = ("max", "soft", "soft_backward")


def next_power(number: int) -> int:
    """The smallest power of two that is not below it, at least 1."""
    return 1 << max(0, number - 1).bit_length()


def held_rows(arch: str, dtype: torch.dtype, precision: str) -> int:
    """The most rows that a tile of the maximum's kernels holds."""
    return _tile(arch, dtype, precision)[0]


def whole_width(arch: str, dtype: torch.dtype, precision: str) -> int:
    """The widest features that a tile holds as a whole; wider ones are streamed in chunks."""
    if not on_tensor_cores(dtype, precision):
        return 0  # every thread would hold whole rows
    if dtype == torch.float32 or arch == "gfx942":
        return 0
    return 128 if arch == "sm80" else 256


def on_tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    return dtype != torch.float32 or precision != "ieee"


def max_config(
    arch: str,
    dtype: torch.dtype,
    width: int,
    precision: str = "ieee",
    *,
    rows: int,
    cols: int,
    positions: bool = False,
    streamed: bool = False,
) -> Config:
    """The configuration of `max_sweep` and `max_long`.

    Args:
        arch: one of `configurations.ARCHITECTURES`.
        dtype: of the tokens.
        width: D.
        precision: for float32 tokens.
        rows, cols: of the held and of the streamed side, where they may be fewer than a tile has.
        positions: of the held tokens' maxima, which take as many registers again.
        streamed: scores of the streamed tokens, too.

    Raises:
        ValueError: a precision that Triton does not have there.
    """
    if precision not in offered(arch):
        raise ValueError(f"precision={precision!r}: on {arch} expected one of {', '.join(offered(arch))}")
    block_m, block_n, block_k, warps, stages = _tile(arch, dtype, precision)
    if positions or streamed:
        block_n = min(block_n, 64)
    block_m = min(block_m, max(64, next_power(rows)))
    block_n = min(block_n, max(16, next_power(cols)))
    if width <= whole_width(arch, dtype, precision):
        block_k = max(16, next_power(width))
        stages = 2
    else:
        block_k = narrowed(block_k, width)
    return Config(block_m, block_n, block_k, warps, stages)


def gather_tile(width: int, interpreted: bool) -> tuple[int, int, int]:
    """Rows, entries and columns of a program of `gather_sum`, which is one warp.

    A warp loads a row of 128 numbers of 16 bits in one instruction of half its lanes. Interpreted, a program costs more than
    what it does, so there it does more.
    """
    cols = min(128, max(16, next_power(width)))
    return (64 if interpreted else 4), 4, cols


def _tile(arch: str, dtype: torch.dtype, precision: str) -> tuple[int, int, int, int, int]:
    if not on_tensor_cores(dtype, precision):
        return 64, 64, 16, 4, 2
    if dtype == torch.float32:
        return 64, 64, 32, 4, 2
    return 128, 128, 64 if arch.startswith("sm9") or arch == "sm100" else 32, 8, 3
