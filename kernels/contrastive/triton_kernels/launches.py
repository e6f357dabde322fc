"""What every launch of one request shares: where it runs, which configuration it gets, how it finds a tile of S."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import Settings
from ..operands import Operands
from . import launching
from .configurations import Config
from .fields import Fields
from .tuning import chosen_config


class Launches:
    """What every launch of one request shares."""

    def __init__(self, operands: Operands, fields: Fields, settings: Settings) -> None:
        x, y = operands.x, operands.y
        self.operands, self.fields, self.settings = operands, fields, settings
        (self.n, self.d), self.m = x.shape, y.shape[0]
        self.device, self.dtype = x.device, x.dtype
        self.arch = launching.architecture(x.device)
        self.tma = launching.aligned(x, self.arch) and launching.aligned(y, self.arch)

    def config(self, kernel: str, *, pressure: int = 0, columns: int | None = None) -> Config:
        return chosen_config(
            self.arch,
            kernel,
            self.dtype,
            self.d,
            self.settings.precision,
            pressure=pressure,
            columns=columns,
            aligned=launching.vectorised(self.operands.x) and launching.vectorised(self.operands.y),
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return launching.empty(*shape, dtype=dtype, device=self.device)

    def tile_arguments(self, config: Config) -> dict[str, Any]:
        """The arguments by which a kernel computes a tile of S, and its rules."""
        operands = self.operands
        return {
            "x": launching.source(operands.x, (config.block_m, config.block_k), self.tma),
            "y": launching.source(operands.y, (config.block_n, config.block_k), self.tma),
            "x_strides": operands.x.stride(),
            "y_strides": operands.y.stride(),
            "scale": operands.scale,
            "bias": operands.bias,
            "row_bias": operands.row_bias,
            "col_bias": operands.col_bias,
            "numbers": tuple(self.fields.numbers),
            "tensors": tuple(self.fields.tensors),
            "n": self.n,
            "m": self.m,
            "d": self.d,
            "FIELDS": self.fields.fields,
            "PER_ROW": operands.per_row_scale,
            "TMA": self.tma,
            **self.constants(),
        }

    def constants(self) -> dict[str, Any]:
        return {"PRECISION": self.settings.precision, "INTERPRETED": launching.interpreting()}


def plain(operands: Operands) -> Operands:
    """The operands without their graph; vectors contiguous, as the kernels index them."""
    x, y, scale, *biases = operands.detached()
    x, y = launching.near(x), launching.near(y)
    return Operands(x, y, _vector(scale), *(None if each is None else _vector(each) for each in biases))


def _vector(tensor: Tensor) -> Tensor:
    return tensor.resolve_neg().contiguous()


def panel_length(length: int, fitting: float, multiple: int) -> int:
    """Rows (columns) of a panel: as many as fit, a multiple of a tile's, one tile at least, all if they are fewer."""
    return max(1, min(length, max(multiple, int(fitting) // multiple * multiple)))
