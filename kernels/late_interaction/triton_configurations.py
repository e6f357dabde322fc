"""Which tile, how many warps and how many stages the kernels of late interaction get: plain functions, nothing is timed."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..contrastive.triton_kernels.configurations import Config, narrowed, offered


def next_power(number: int) -> int:
    """The smallest power of two that is not below it, at least 1."""
    return 1 << max(0, number - 1).bit_length()


def check_precision(arch: str, precision: str) -> None:
    """Raise ValueError for one that Triton does not have on that architecture."""
    if precision not in offered(arch):
        raise ValueError(f"precision={precision!r}: on {arch} expected one of {', '.join(offered(arch))}")


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
    """Whether products are theirs; float32's are exact products of its own unit unless another precision is asked for."""
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
    """
    block_m, block_n, block_k, warps, stages = _tile(arch, dtype, precision)
    if (positions or streamed) and on_tensor_cores(dtype, precision):
        # Blackwell's threads hold a row each, and with it what belongs to the row.
        block_n = min(block_n, 32 if arch == "sm100" else 64)
        warps = 8
    block_m = min(block_m, max(64, next_power(rows)))
    block_n = min(block_n, max(16, next_power(cols)))
    return _fitted(Config(block_m, block_n, block_k, warps, stages), arch, dtype, width, precision)


def gather_tile(width: int, interpreted: bool) -> tuple[int, int, int]:
    """Rows, entries and columns of a program of `gather_sum`, which is one warp.

    A warp loads a row of 128 numbers of 16 bits in one instruction of half its lanes. Interpreted, a program costs more than
    what it does, so there it does more.
    """
    cols = min(128, max(16, next_power(width)))
    return (64 if interpreted else 4), 4, cols


def _tile(arch: str, dtype: torch.dtype, precision: str) -> tuple[int, int, int, int, int]:
    if not on_tensor_cores(dtype, precision):
        return 32, 64, 16, 4, 2
    if dtype == torch.float32:
        # The old instructions hold the halves of three products in registers.
        return (64, 32, 16, 8, 2) if arch == "sm80" and precision == "tf32x3" else (64, 64, 32, 4, 2)
    return 128, 128, 64 if arch.startswith("sm9") or arch == "sm100" else 32, 8, 3


def soft_config(arch: str, dtype: torch.dtype, width: int, precision: str) -> Config:
    """The configuration of `soft_sweep`."""
    if not on_tensor_cores(dtype, precision):
        return Config(64, 32, 16, 4, 2)
    config = _soft_tile(arch, dtype, precision, 64)
    return _fitted(config, arch, dtype, width, precision) if arch != "sm80" and width <= 128 else config


def soft_gradient_config(arch: str, dtype: torch.dtype, width: int, precision: str) -> tuple[Config, int]:
    """The configuration of `soft_gradient`, and how many columns of the gradients a program owns."""
    most = 128 if dtype != torch.float32 else 32 if arch == "sm100" else 64
    cols = min(most, max(16, next_power(width)))
    if not on_tensor_cores(dtype, precision):
        # Each thread holds the weights of its rows: few columns at a time.
        return Config(32, 16, 16, 4, 2), cols
    config = _soft_tile(arch, dtype, precision, 32)
    # Wider rows in one piece would leave the gradients no registers.
    return (_fitted(config, arch, dtype, width, precision) if width <= 128 else config), cols


def _soft_tile(arch: str, dtype: torch.dtype, precision: str, block_k: int) -> Config:
    # The old instructions read their operands from registers: more threads have more of them.
    old = arch == "sm80"
    if dtype == torch.float32:
        return Config(64, 32, 16 if old and precision == "tf32x3" else 32, 8 if old or arch == "sm100" else 4, 2)
    return Config(64, 32 if old or arch == "sm100" else 64, block_k, 8 if old else 4, 2)


def _fitted(config: Config, arch: str, dtype: torch.dtype, width: int, precision: str) -> Config:
    """With D in one piece where that fits, else in chunks that it fills."""
    if width <= whole_width(arch, dtype, precision):
        return replace(config, block_k=max(16, next_power(width)), num_stages=2)
    return replace(config, block_k=narrowed(config.block_k, width))
