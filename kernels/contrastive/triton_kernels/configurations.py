"""Which tile, how many warps and how many stages: a plain function of the architecture and the work.

Nothing is timed at run time, so that every rank of a job runs the same kernel and gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Architectures whose configurations ship, by the name of their target.
ARCHITECTURES = ("sm80", "sm90", "sm100", "gfx942")
#: The three kernels that multiply.
KERNELS = ("reduce", "weigh", "product")
#: How float32 operands are multiplied.
PRECISIONS = ("ieee", "tf32", "tf32x3")


def offered(arch: str) -> tuple[str, ...]:
    """Those of PRECISIONS that Triton has on an architecture."""
    return PRECISIONS if arch != "gfx942" else ("ieee", "tf32")


@dataclass(frozen=True)
class Config:
    """One launch configuration: a tile of block_m x block_n, whose inner dimension is streamed block_k at a time.

    `group` tile rows are walked together (`tiles.tile_of`).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8


_Tile = tuple[int, int, int, int, int]

# (block_m, block_n, block_k, warps, stages) of operands of 16 bits. Chosen by `python -m benchmarks.audit`: no spills, the
# new matrix instructions (16 warps would fall back to the old ones), then the fewest bytes from L2 per product. A
# warpgroup of Hopper that holds 128 rows instead of 64 needs half the shuffles for its column sums. Weights want two
# tiles in registers, scores and weights, and on Blackwell, where a thread holds a row, a factor for each column.
_TENSOR_16 = {
    "sm80": {"reduce": (128, 128, 32, 8, 4), "weigh": (128, 128, 32, 8, 4), "product": (128, 128, 32, 8, 4)},
    "sm90": {"reduce": (256, 128, 64, 8, 4), "weigh": (128, 128, 64, 8, 4), "product": (128, 256, 64, 8, 4)},
    "sm100": {"reduce": (128, 128, 64, 8, 4), "weigh": (128, 64, 64, 8, 4), "product": (128, 128, 64, 8, 4)},
    "gfx942": {"reduce": (128, 128, 32, 8, 2), "weigh": (128, 128, 32, 8, 2), "product": (128, 128, 32, 8, 2)},
}
_TENSOR_32 = {
    "sm80": {"reduce": (128, 128, 32, 8, 3), "weigh": (128, 64, 32, 8, 3), "product": (128, 128, 32, 8, 3)},
    "sm90": {"reduce": (128, 128, 32, 8, 4), "weigh": (128, 64, 32, 8, 4), "product": (128, 128, 32, 8, 4)},
    "sm100": {"reduce": (128, 128, 32, 8, 3), "weigh": (128, 64, 32, 8, 3), "product": (128, 128, 32, 8, 3)},
    "gfx942": {"reduce": (64, 64, 32, 4, 2), "weigh": (64, 64, 32, 4, 2), "product": (64, 64, 32, 4, 2)},
}
# Three products of halves hold four tiles of operands in registers where the old instructions read them from there.
_SM80_TF32X3 = {"reduce": (64, 64, 32, 8, 3), "weigh": (128, 64, 32, 8, 3), "product": (64, 64, 16, 8, 3)}
_FMA = (64, 64, 16, 4, 2)


def pick_config(
    arch: str,
    kernel: str,
    dtype: torch.dtype,
    width: int,
    precision: str = "ieee",
    *,
    columns: int | None = None,
    aligned: bool = True,
    pressure: int = 0,
) -> Config:
    """The configuration that serves a launch.

    Args:
        arch: one of ARCHITECTURES.
        kernel: one of KERNELS.
        dtype: of the features.
        width: D; a narrow one is streamed in smaller chunks, which it fills.
        precision: for float32 features, one of PRECISIONS.
        columns: of the result, where they may be fewer than a tile has; the product's D.
        aligned: rows of the features start at multiples of 16 bytes. If not they are loaded element by element, whose
            addresses take registers.
        pressure: on the registers, in which a tile stays as long as something is made of it: 0 with one field, 1 where
            terms and weights are made of it at once, 2 with several fields, 3 where two or three tiles are needed at
            once but little to tell which pairs count. Of the product: 1 where rows end in a tile.

    Raises:
        ValueError: a name that is in none of these lists, or a precision that Triton does not have there.
    """
    for name, given, known in (("arch", arch, ARCHITECTURES), ("kernel", kernel, KERNELS)):
        if given not in known:
            raise ValueError(f"{name}={given!r}: expected one of {', '.join(known)}")
    if precision not in offered(arch):
        raise ValueError(f"precision={precision!r}: on {arch} expected one of {', '.join(offered(arch))}")
    tile = _tile(arch, kernel, dtype, precision)
    on_tensor_cores = dtype != torch.float32 or precision != "ieee"
    if not aligned and on_tensor_cores:
        tile = _within(tile, 128, 128 if kernel == "reduce" else 64, 32)
    if pressure == 1 and on_tensor_cores:
        tile = _within(tile, 128, 64 if kernel == "weigh" else 128, 64)
    if pressure >= 2 and kernel != "product":
        narrow = not on_tensor_cores or not aligned
        tall = pressure == 3 and not narrow and dtype != torch.float32
        # With 8 warps the largest of a ragged tile keep a pointer on Blackwell's stack.
        warps = 4 if arch == "sm100" and pressure == 3 and narrow else 8
        tile = (*_within(tile, 128 if tall else 64, 32 if narrow else 64, 64)[:3], warps, tile[4])
        # Three products of halves beside a teacher's tile: what the old instructions read from registers must be little.
        if pressure == 3 and arch == "sm80" and precision == "tf32x3":
            tile = (*_within(tile, 64, 32, 16)[:3], warps, tile[4])
    block_m, block_n, block_k, warps, stages = tile
    if kernel != "product":
        block_k = narrowed(block_k, width)
    if columns is not None:
        while block_n >= 2 * max(columns, 64):
            block_n //= 2
        if arch == "sm100" and block_n == 64 and (aligned or precision != "tf32x3"):
            warps = 4  # with 8 the compiler keeps an address on the stack; with 4 and three products, some operands
    return Config(block_m, block_n, block_k, warps, stages)


def narrowed(block_k: int, width: int) -> int:
    """The chunk of the inner dimension that a narrow one fills."""
    while block_k >= 2 * max(width, 32):
        block_k //= 2
    return block_k


def _tile(arch: str, kernel: str, dtype: torch.dtype, precision: str) -> _Tile:
    if dtype != torch.float32:
        return _TENSOR_16[arch][kernel]
    if precision == "ieee":
        return _FMA
    if precision == "tf32x3" and arch == "sm80":
        return _SM80_TF32X3[kernel]
    return _TENSOR_32[arch][kernel]


def _within(tile: _Tile, block_m: int, block_n: int, block_k: int) -> _Tile:
    return min(tile[0], block_m), min(tile[1], block_n), min(tile[2], block_k), tile[3], tile[4]
