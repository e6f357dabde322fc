"""Reductions of the whole similarity matrix, as one block of it sees them.

The rows of a block are some consecutive rows of S, its columns some consecutive columns. Rules name pairs by their position
in S; the tensors that a reduction holds belong to the rows or to the columns, and a block has its part of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .reductions import ColumnRange, Diagonal, Target, Teacher, rules_of

T = TypeVar("T")

# What a field of a reduction holds. `weights` lie along the reduced axis, `thresholds` along the owners.
_RULES = ("exclude", "positive")
_TEACHERS = ("of", "under")


@dataclasses.dataclass
class Metadata:
    """The tensors of some reductions, each once, by what they belong to."""

    rows: list[Tensor]
    cols: list[Tensor]

    @classmethod
    def of(cls, reductions: list[tuple[int, Any]]) -> Metadata:
        """Of (dim, reduction) pairs: dim 1 for a reduction of rows, 0 for one of columns."""
        found = cls([], [])

        def file(tensor: Tensor, dim: int) -> Tensor:
            side = found.rows if dim == 1 else found.cols
            if all(tensor is not known for known in side):
                side.append(tensor)
            return tensor

        for dim, reduction in reductions:
            _Walk(file, lambda pair: pair, {}, dim).reduction(reduction)
        return found


@dataclasses.dataclass(frozen=True)
class Block:
    """Where a block lies, and its part of the metadata.

    Attributes:
        row_start, col_start: positions in S of its first row and of its first column.
        columns: how many it has.
        of_rows, of_cols: id of a tensor of a reduction -> its part in this block. One tensor may belong to both.
    """

    row_start: int
    col_start: int
    columns: int
    of_rows: dict[int, Tensor]
    of_cols: dict[int, Tensor]

    def place(self, reductions: list[tuple[int, T]]) -> list[tuple[int, T]]:
        """The same (dim, reduction) pairs with this block's rules, ids, weights and teachers. One teacher stays one object."""
        teachers: dict[int, Teacher] = {}
        return [(dim, _Walk(self._part, self._pair, teachers, dim).reduction(each)) for dim, each in reductions]

    def _part(self, tensor: Tensor, dim: int) -> Tensor:
        return (self.of_rows if dim == 1 else self.of_cols)[id(tensor)]

    def _pair(self, pair: Any) -> Any:
        if isinstance(pair, Diagonal):
            return Diagonal(pair.offset + self.row_start - self.col_start)
        if isinstance(pair, ColumnRange):
            return ColumnRange(pair.start - self.col_start, pair.stop - self.col_start)
        columns = self._part(pair.columns, 1) - self.col_start
        return Target(torch.where((columns >= 0) & (columns < self.columns), columns, -1))


def with_vector_scales(reductions: Iterable[T], rows: int) -> list[T]:
    """The same; a teacher's scale that is a tensor is one number for each row, so that all ranks see one form."""
    made: dict[int, Teacher] = {}

    def vector(given: Teacher) -> Teacher:
        if id(given) not in made:
            scale = given.scale
            wide = scale.reshape(-1).expand(rows) if isinstance(scale, Tensor) else scale
            made[id(given)] = Teacher(given.x, given.y, wide)
        return made[id(given)]

    found: list[T] = []
    for each in reductions:
        teachers = {name: getattr(each, name, None) for name in _TEACHERS}
        changed: dict[str, Any] = {name: vector(of) for name, of in teachers.items() if isinstance(of, Teacher)}
        found.append(dataclasses.replace(each, **changed) if changed else each)  # type: ignore[type-var]
    return found


class _Walk:
    """Makes a reduction of one direction anew, with its tensors and positions mapped.

    Args:
        part: (tensor, 1 if it belongs to the rows, 0 to the columns) -> what takes its place.
        pair: of a Diagonal, a Target or a ColumnRange, what takes its place.
        teachers: by identity, those made so far.
        dim: the direction.
    """

    def __init__(
        self, part: Callable[[Tensor, int], Tensor], pair: Callable[[Any], Any], teachers: dict[int, Teacher], dim: int
    ) -> None:
        self._part, self._pair, self._teachers, self._dim = part, pair, teachers, dim

    def reduction(self, given: T) -> T:
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(given):  # type: ignore[arg-type]
            value = getattr(given, field.name)
            if value is None:
                continue
            if field.name in _RULES:
                changed[field.name] = tuple([self._rule(rule) for rule in rules_of(value)])
            elif field.name in _TEACHERS and isinstance(value, Teacher):
                changed[field.name] = self._teacher(value)
            elif field.name == "pair":
                changed["pair"] = self._rule(value)
            elif field.name == "weights":
                changed["weights"] = self._part(value, 1 - self._dim)
            elif field.name == "thresholds":
                changed["thresholds"] = self._part(value, self._dim)
        return dataclasses.replace(given, **changed)  # type: ignore[type-var]

    def _rule(self, rule: Any) -> Any:
        if isinstance(rule, Target):
            self._part(rule.columns, 1)
        if isinstance(rule, (Diagonal, Target, ColumnRange)):
            return self._pair(rule)
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(rule):
            value = getattr(rule, field.name)
            if field.name == "pair":
                changed["pair"] = self._rule(value)
            elif field.name == "thresholds":
                changed["thresholds"] = self._part(value, self._dim)
            elif field.name in ("rows", "cols"):
                changed[field.name] = self._part(value, int(field.name == "rows"))
        return dataclasses.replace(rule, **changed)

    def _teacher(self, given: Teacher) -> Teacher:
        if id(given) not in self._teachers:
            scale = given.scale
            if isinstance(scale, Tensor) and scale.dim():
                scale = self._part(scale, 1)
            self._teachers[id(given)] = Teacher(self._part(given.x, 1), self._part(given.y, 0), scale)
        return self._teachers[id(given)]
