"""Random requests whose rows and columns lie over ranks, held to the dense formula in float64 on one process."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from contenders import relative_error
from torch import Tensor

from pairtile.kernels import ArgMax, ArgTopK, Max, Target, Teacher, TopK, similarity_reduce, use_backend
from pairtile.kernels.distributed import Exchange
from similarity_cases import NAMES, Case, cancelling_sizes, objective, outcome, random_case

#: Operands that lie along the columns. The others that are no number lie along the rows.
_OF_COLS = ("y", "col_bias")


class Part:
    """What one rank holds of a case: its rows and columns, and of a reduction what belongs to them."""

    def __init__(self, rows: slice, cols: slice) -> None:
        self.rows, self.cols = rows, cols
        self._teachers: dict[int, Teacher] = {}

    def operand(self, name: str, value: Tensor | None) -> Tensor | None:
        if value is None or value.dim() == 0:
            return value
        return value[self.cols if name in _OF_COLS else self.rows]

    def reduction(self, given: Any, dim: int) -> Any:
        found: dict[str, Any] = {}
        for field in dataclasses.fields(given):
            value = getattr(given, field.name)
            if field.name in ("exclude", "positive") and value is not None:
                rules = value if isinstance(value, tuple) else (value,)
                found[field.name] = tuple(self._rule(rule) for rule in rules)
            elif isinstance(value, Teacher):
                found[field.name] = self._teacher(value)
            elif field.name == "pair":
                found[field.name] = self._rule(value)
            elif isinstance(value, Tensor):  # weights, along the axis that is reduced
                found[field.name] = value[self.cols if dim == 1 else self.rows]
        return dataclasses.replace(given, **found)

    def _rule(self, rule: Any) -> Any:
        if isinstance(rule, Target):
            return Target(rule.columns[self.rows])
        if hasattr(rule, "pair"):
            return dataclasses.replace(rule, pair=self._rule(rule.pair))
        if hasattr(rule, "rows"):
            return dataclasses.replace(rule, rows=rule.rows[self.rows], cols=rule.cols[self.cols])
        return rule

    def _teacher(self, given: Teacher) -> Teacher:
        if id(given) not in self._teachers:
            scale = given.scale
            scale = scale[self.rows] if isinstance(scale, Tensor) and scale.dim() else scale
            self._teachers[id(given)] = Teacher(given.x[self.rows], given.y[self.cols], scale)
        return self._teachers[id(given)]


@dataclasses.dataclass
class ShardedCase:
    """A case and how it lies over the ranks.

    Attributes:
        case: the whole.
        indices: reductions of rows and of columns that give indices, asked for behind the case's own.
        rows, cols: of each rank.
        wanted: for each rank the operands that want a gradient there.
    """

    case: Case
    indices: tuple[list, list]
    rows: list[int]
    cols: list[int]
    wanted: list[set[str]]

    def part(self, rank: int) -> ShardedCase:
        """The same, of one rank's rows and columns."""
        slices = [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for sizes in (self.rows, self.cols)]
        part = Part(*slices)
        operands = [part.operand(name, each) for name, each in zip(NAMES, self.case.operands, strict=True)]
        asked = [self.case.rows, self.case.cols, *self.indices]
        rows, cols, *indices = ([part.reduction(each, 1 - k % 2) for each in given] for k, given in enumerate(asked))
        upstream = [each[slices[k >= len(rows)]] for k, each in enumerate(self.case.upstream)]
        return dataclasses.replace(
            self, case=Case(operands, rows, cols, upstream, self.case.budget), indices=tuple(indices)
        )


def sharded_case(seed: int, world: int) -> ShardedCase:
    """Shards of any size; every operand wants a gradient on most ranks."""
    case = random_case(seed, richer=True)
    choose = random.Random(seed)
    n, m = (len(each) for each in case.operands[:2])
    rows = _sizes(choose, n, world)
    cols = rows if n == m else _sizes(choose, m, world)
    # A number is one tensor on all ranks.
    numbers = {name for name, each in zip(NAMES, case.operands, strict=True) if each is not None and each.dim() == 0}
    everywhere = {name for name in numbers if choose.random() < 0.8}
    wanted = [everywhere | {name for name in NAMES if name not in numbers and choose.random() < 0.8} for _ in rows]
    return ShardedCase(case, (_indices(case.rows), _indices(case.cols)), rows, cols, wanted)


def _sizes(choose: random.Random, total: int, world: int) -> list[int]:
    cuts = sorted(choose.choice([0, total, choose.randint(0, total)]) for _ in range(world - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def _indices(reductions: list) -> list:
    return [
        ArgMax(each.exclude, each.of) if isinstance(each, Max) else ArgTopK(each.k, each.exclude, each.of)
        for each in reductions
        if isinstance(each, (Max, TopK))
    ]


def share(sharded: ShardedCase, rank: int, dtype: torch.dtype, exchange: Exchange | None) -> dict[str, Tensor]:
    """Results and gradients of one rank's part, by name; no gradient where none is wanted."""
    part = sharded.part(rank)
    leaves = {
        name: None if each is None else each.to(dtype, copy=True).requires_grad_(name in sharded.wanted[rank])
        for name, each in zip(NAMES, part.case.operands, strict=True)
    }
    bias = 0.0 if leaves["bias"] is None else leaves["bias"]
    rows, cols = similarity_reduce(
        **leaves | {"bias": bias},
        rows=part.case.rows + part.indices[0],
        cols=part.case.cols + part.indices[1],
        memory_budget=part.case.budget,
        group=exchange,
    )
    results = [*rows[: len(part.case.rows)], *cols[: len(part.case.cols)]]
    found = {f"result {k}": each.detach() for k, each in enumerate(results)}
    found |= {f"row index {k}": each for k, each in enumerate(rows[len(part.case.rows) :])}
    found |= {f"column index {k}": each for k, each in enumerate(cols[len(part.case.cols) :])}
    total = objective(results, part.case)
    if total.requires_grad:
        total.backward()
    for name in sharded.wanted[rank]:
        leaf = leaves[name]
        if leaf is not None:
            found[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def assert_equal_to_one_process(
    sharded: ShardedCase, shares: list[dict[str, Tensor]], dtype: torch.dtype, label: str
) -> None:
    """What the ranks found, against the dense formula on the whole: in float64 to 1e-10, in float32 as issue 8 has it."""
    with use_backend("reference"):
        truth = outcome(sharded.case, sharded.case.to(torch.float64))
        dense = outcome(sharded.case, sharded.case.to(torch.float32))
        alone = ShardedCase(sharded.case, sharded.indices, [sum(sharded.rows)], [sum(sharded.cols)], [set()])
        indices = share(alone, 0, torch.float64, None)
    sizes = cancelling_sizes(sharded.case)
    for name in dict.fromkeys(name for each in shares for name in each):
        if "index" in name:
            assert torch.equal(torch.cat([each[name] for each in shares]), indices[name]), f"{label}: {name}"
            continue
        given = _joined(name, truth[name], sharded, shares)
        error, size = relative_error(given, truth[name], sizes.get(name, 0.0)), sizes.get(name, 0.0)
        own = relative_error(dense[name], truth[name], size)
        allowed = 1e-10 if dtype == torch.float64 else max(1e-5, 2 * own)
        assert error <= allowed, f"{label}: {name} {error:.2g} > {allowed:.2g}"


def _joined(name: str, truth: Tensor, sharded: ShardedCase, shares: list[dict[str, Tensor]]) -> Tensor:
    """All ranks' part; the truth where a rank wants no gradient."""
    if truth.dim() == 0:
        return torch.stack([each[name] for each in shares]).double().sum()
    kind, _, number = name.partition(" ")
    along_cols = name[1:] in _OF_COLS or (kind == "result" and int(number) >= len(sharded.case.rows))
    pieces = truth.split(sharded.cols if along_cols else sharded.rows)
    return torch.cat([each.get(name, piece).double() for each, piece in zip(shares, pieces, strict=True)])
