"""What one program of each kernel has to do, taken from its source: FLOPs, trips of its main loop, bytes it streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pairtile.kernels.contrastive.triton_kernels.configurations import Config
from pairtile.kernels.contrastive.triton_kernels.launching import cdiv

from .launches import Launch


@dataclass(frozen=True)
class Work:
    """What one program does.

    Attributes:
        flops: useful ones, of one program.
        trips: of the kernel's main loop.
        streamed: bytes that descriptors load; what other instructions move is read off the code.
        tile: as the table writes it.
    """

    flops: float
    trips: int
    streamed: int
    tile: str


def work_of(launch: Launch) -> Work:
    return _WORK[launch.name](launch)


def _tile_of_scores(launch: Launch) -> Work:
    """`reduce_tiles`, `weigh_tiles`: a tile of S, D streamed. What teachers add is not counted: they have loops of their own,
    and a kernel is taken to have one."""
    config, given = launch.config, launch.arguments
    assert config is not None
    trips = cdiv(given["d"], config.block_k)
    itemsize = _itemsize(given["x"])
    chunk = (config.block_m + config.block_n) * config.block_k * itemsize
    flops = 2 * config.block_m * config.block_n * given["d"]
    return Work(flops, trips, chunk * trips if given["TMA"] else 0, _name(config))


def _block_of_gradient(launch: Launch) -> Work:
    """`add_product`: a block of dx or dy, the other side of the panel streamed."""
    config, given = launch.config, launch.arguments
    assert config is not None
    trips = cdiv(given["depth"], config.block_k)
    chunk = config.block_m * given["TMA_WEIGHTS"] + config.block_n * given["TMA"]
    itemsize = _itemsize(given["features"])
    flops = 2 * given["rows"] * given["width"] * given["depth"] / launch.programs
    return Work(flops, trips, chunk * config.block_k * itemsize * trips, _name(config))


def _owners(launch: Launch) -> Work:
    """`merge_partials`: some rows (columns), their partial results streamed."""
    given = launch.arguments
    return Work(0, cdiv(given["tiles"], given["TILES"]), 0, f"{given['BLOCK']}x{given['TILES']}")


def _pairs_of_sets(launch: Launch) -> Work:
    """`max_sweep`, `max_long`, `soft_sweep`, `soft_gradient`: a tile of held rows beside one streamed set. A kernel of loops
    within loops has no account: its FLOPs are not told."""
    config, given = launch.config, launch.arguments
    assert config is not None
    held, streamed = given["held"], given["streamed"]
    longest = streamed.rows // max(1, streamed.sets)
    one_loop = launch.name == "max_sweep" and given["WHOLE"] and given["SETS"] == 1 and streamed.keep is None
    if not one_loop:
        return Work(0, 1, 0, _name(config))
    flops = 2 * min(config.block_m, held.rows) * longest * given["d"]
    return Work(flops, cdiv(longest, config.block_n), 0, _name(config))


def _pairs_of_tokens(launch: Launch) -> Work:
    """`partner_sweep`, `energy_sweep`: some rows of a sample beside all that they may meet, of LATER half of them in the mean.
    The account is of one loop: where D is streamed too, its FLOPs are not told."""
    config, given = launch.config, launch.arguments
    assert config is not None
    if not given["WHOLE"]:
        return Work(0, 1, 0, _name(config))
    held, streamed = given["x"].rows, given.get("y", given["x"]).rows
    flops = 2 * min(config.block_m, held) * streamed * given["d"]
    return Work(flops, cdiv(streamed, config.block_n), 0, _name(config))


def _rows_of_tokens(launch: Launch) -> Work:
    """`combine_rows`, `spread_rows`: rows of what is written."""
    given = launch.arguments
    return Work(0, 1, 0, f"{given['ROWS']}x{given['COLS']}")


def _gathered_rows(launch: Launch) -> Work:
    """`gather_sum`: rows of one side, what they sum streamed."""
    given = launch.arguments
    return Work(0, 1, 0, f"{given['ROWS']}x{given['ENTRIES']}x{given['COLS']}")


_WORK = {
    "reduce_tiles": _tile_of_scores,
    "weigh_tiles": _tile_of_scores,
    "add_product": _block_of_gradient,
    "merge_partials": _owners,
    "gather_sum": _gathered_rows,
    "partner_sweep": _pairs_of_tokens,
    "energy_sweep": _pairs_of_tokens,
    "combine_rows": _rows_of_tokens,
    "spread_rows": _rows_of_tokens,
} | dict.fromkeys(("max_sweep", "max_long", "soft_sweep", "soft_gradient"), _pairs_of_sets)

#: Kernels of late interaction.
LATE = ("max_sweep", "max_long", "soft_sweep", "soft_gradient", "gather_sum")
#: Kernels of token merging.
TOKENS = ("partner_sweep", "energy_sweep", "combine_rows", "spread_rows")


def _itemsize(source: Any) -> int:
    """Of a tensor's elements, or of those that a descriptor loads."""
    return getattr(source, "base", source).dtype.itemsize


def _name(config: Config) -> str:
    return f"{config.block_m}x{config.block_n}x{config.block_k}"
