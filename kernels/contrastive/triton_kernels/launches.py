"""What every launch of one request shares: where it runs, which configuration it gets, how it finds a tile of S."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import Settings
from ..operands import Operands
from ..reductions import Teacher
from . import launching
from .configurations import Config, narrowed
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
        self.tma = self._tma(x, y)
        self.teachers = [_plain_teacher(each) for each in fields.teachers]

    def _tma(self, x: Tensor, y: Tensor) -> bool:
        return launching.aligned(x, self.arch) and launching.aligned(y, self.arch)

    def config(self, kernel: str, *, pressure: int = 0, columns: int | None = None) -> Config:
        features = [self.operands, *(self.teachers if kernel != "product" else ())]
        return chosen_config(
            self.arch,
            kernel,
            self.dtype,
            self.d,
            self.settings.precision,
            pressure=pressure,
            columns=columns,
            aligned=all(launching.vectorised(each.x) and launching.vectorised(each.y) for each in features),
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
            "factors": tuple(self.fields.factors) or None,
            "tensors": tuple(self.fields.tensors),
            "n": self.n,
            "m": self.m,
            "d": self.d,
            "STEPS": self.fields.steps,
            "PER_ROW": operands.per_row_scale,
            "TMA": self.tma,
            **self._taught(config),
            **self.constants(),
        }

    def _taught(self, config: Config) -> dict[str, Any]:
        """The teachers, each streamed by itself: in chunks of its own width, by descriptors if its rows are aligned."""
        arguments, constants = [], []
        for x, y, scale in self.teachers:
            tma, block_k = self._tma(x, y), narrowed(config.block_k, x.shape[1])
            sources = (
                launching.source(each, (rows, block_k), tma)
                for each, rows in ((x, config.block_m), (y, config.block_n))
            )
            arguments.append((*sources, x.stride(), y.stride(), scale, x.shape[1]))
            constants.append((scale.dim() == 1, tma, block_k))
        return {"teachers": tuple(arguments) or None, "TEACHERS": tuple(constants)}

    def constants(self) -> dict[str, Any]:
        return {"PRECISION": self.settings.precision, "INTERPRETED": launching.interpreting()}


class PlainTeacher(NamedTuple):
    """A teacher as the kernels take it: x [N, D'] and y [M, D'] in the features' dtype, scale [] or [N]."""

    x: Tensor
    y: Tensor
    scale: Tensor


def _plain_teacher(teacher: Teacher) -> PlainTeacher:
    assert isinstance(teacher.scale, Tensor), "the operator resolves it before a backend sees it"
    return PlainTeacher(launching.near(teacher.x), launching.near(teacher.y), _vector(teacher.scale))


def reach(x: Tensor, y: Tensor, scale: Tensor, biases: Iterable[Tensor | None] = ()) -> Tensor:
    """[]: a bound of |scale <x_i, y_j> + biases|, by the norms of the features."""
    norms = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float32).amax() for each in (x, y)]
    found: Tensor = scale.abs().amax() * norms[0] * norms[1]
    for bias in biases:
        if bias is not None:
            found = found + bias.abs().amax()
    return found


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
