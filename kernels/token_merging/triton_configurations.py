"""Which tile, how many warps and how many stages the kernels of token merging get: plain functions, nothing is timed."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..contrastive.triton_kernels.configurations import Config
from ..late_interaction.triton_configurations import next_power, on_tensor_cores

# Rows of a sample up to which a tile of half the height leaves less of itself empty, and gives twice as many programs.
_FEW_ROWS = 256
# D up to which the streamed rows come from L2 as fast as they are multiplied.
_NARROW = 128


def sweep_config(arch: str, dtype: torch.dtype, width: int, *, rows: int, cols: int) -> Config:
    """The configuration of `partner_sweep` and `energy_sweep`.

    Args:
        arch: one of `configurations.ARCHITECTURES`.
        dtype: of the tokens; float32 ones are multiplied as "ieee".
        width: D.
        rows, cols: of a sample's held and streamed side.
    """
    if not on_tensor_cores(dtype, "ieee"):
        config = Config(64, 64, 16, 8, 2)
    else:
        whole = width <= whole_width(arch)
        block_k = max(16, next_power(width)) if whole else 64
        # Twice the height fetches the streamed rows half as often, which wide ones need; Blackwell takes as long for half a
        # tile. Otherwise more of the small ones run at a time.
        tall = arch == "sm100" or (width > _NARROW and rows > _FEW_ROWS)
        # The old instructions read their operands from registers: more threads have more of them.
        warps = 8 if tall or (arch == "sm80" and block_k > 64) else 4
        # A thread of Blackwell holds a row, and with it two numbers for each lane.
        config = Config(128 if tall else 64, 32 if arch == "sm100" else 64, block_k, warps, 2)
    return replace(config, block_n=min(config.block_n, max(16, next_power(cols))))


def whole_width(arch: str) -> int:
    """The widest 16-bit tokens that a tile holds as a whole; wider ones are streamed in chunks."""
    return 128 if arch in ("sm80", "gfx942") else 256


def row_tile(width: int, interpreted: bool) -> tuple[int, int]:
    """Rows and columns of a program of `combine_rows` and `spread_rows`, which is one warp: its searches take no barrier.

    Interpreted, a program costs more than what it does, so there it does more.
    """
    return (64 if interpreted else 1), min(512, max(16, next_power(width)))


def search_block(merged: int) -> int:
    """Merged tokens whose places a program of `combine_rows` looks at together, one to eight for each lane of a warp."""
    return min(256, max(32, next_power(merged)))
