"""A plan as the kernels take it: constexpr fields, and the numbers and tensors that they point to.

A *field* is one function of the scores: the exponentials of the pairs that its rules leave, or softplus terms. It
serves a reduction of rows, one of columns, or both, which then share its exponentials. A *slot* numbers the results of
one direction: first the reductions that look at every pair, then the pairs' own scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..plan import Plan
from ..reductions import (
    Above,
    ColumnRange,
    Diagonal,
    DifferentId,
    LogSumExp,
    PairRule,
    PairScore,
    SameId,
    Target,
    rules_of,
)

Rule = tuple[int, int, int]
#: (kind, dim, weights, positive rules, excluding rules, row slot or -1, column slot or -1)
Field = tuple[int, int, int, tuple[Rule, ...], tuple[Rule, ...], int, int]
#: ((rule,), row slot or -1, column slot or -1)
Pair = tuple[tuple[Rule, ...], int, int]


@dataclass
class Fields:
    """What `FIELDS`, `PAIRS`, `numbers` and `tensors` of the kernels are.

    Attributes:
        fields, pairs: constants of the compilation.
        numbers: offsets and ends of ranges, at run time: another offset is, as a rule, no other kernel.
        tensors: ids, targets, thresholds, weights.
        slots: of each reduction of the plan its slot in its direction.
        dense: how many slots look at every pair, by direction.
    """

    fields: tuple[Field, ...] = ()
    pairs: tuple[Pair, ...] = ()
    numbers: list[int] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    dense: dict[int, int] = field(default_factory=dict)

    @property
    def weighted(self) -> bool:
        return any(each[0] == 0 and each[2] >= 0 for each in self.fields)


def fields_of(plan: Plan, n: int, m: int, filler: Tensor) -> Fields:
    """Sort a plan into fields. `filler` stands where there is no tensor: a tuple of none has no type."""
    found = Fields()
    counts = {1: 0, 0: 0}
    for dim, reduction in plan:
        counts[dim] += not isinstance(reduction, PairScore)
    found.dense = dict(counts)
    next_dense, next_pair = {1: 0, 0: 0}, dict(counts)
    encoder = _Encoder(found, n, m)
    fields: dict[tuple[object, ...], list[int]] = {}
    pairs: list[Pair] = []
    for dim, reduction in plan:
        if isinstance(reduction, PairScore):
            slot = next_pair[dim]
            next_pair[dim] += 1
            pairs.append(((encoder.rule(reduction.pair),), *((slot, -1) if dim == 1 else (-1, slot))))
        else:
            slot = next_dense[dim]
            next_dense[dim] += 1
            kind = 0 if isinstance(reduction, LogSumExp) else 1
            positive = () if isinstance(reduction, LogSumExp) else encoder.rules(reduction.positive)
            exclude = encoder.rules(reduction.exclude)
            weights = -1 if reduction.weights is None else encoder.tensor(reduction.weights)
            owned = weights >= 0 or any(rule[0] in (4, 6) for rule in (*positive, *exclude))
            key: tuple[object, ...] = (kind, dim if owned else 1, weights, positive, exclude)
            # A second reduction of the same direction asks for the same again, and gets a field of its own.
            while (slots := fields.setdefault(key, [-1, -1]))[1 - dim] >= 0:
                key = (*key, "again")
            slots[1 - dim] = slot
        found.slots.append(slot)
    found.fields = tuple((*key[:5], *slots) for key, slots in fields.items())  # type: ignore[misc]
    found.pairs = tuple(pairs)
    found.numbers = found.numbers or [0]
    found.tensors = found.tensors or [filler]
    return found


class _Encoder:
    def __init__(self, found: Fields, n: int, m: int) -> None:
        self._found, self._n, self._m = found, n, m
        self._given: list[Tensor] = []

    def rules(self, given: object) -> tuple[Rule, ...]:
        return tuple(self.rule(each) for each in rules_of(given))  # type: ignore[arg-type]

    def rule(self, rule: PairRule) -> Rule:
        match rule:
            case Diagonal():
                return 0, self._offset(rule), 0
            case SameId():
                return 1, self.tensor(rule.rows), self.tensor(rule.cols)
            case DifferentId():
                return 2, self.tensor(rule.rows), self.tensor(rule.cols)
            case ColumnRange():
                ends = (min(max(end, 0), self._m) for end in (rule.start, rule.stop))
                start, stop = (self.number(end) for end in ends)
                return 3, start, stop
            case Target():
                return 5, self.tensor(rule.columns), 0
            case Above(pair=Diagonal() as pair):
                return 4, self._offset(pair), self.tensor(rule.thresholds)
            case Above(pair=Target() as pair):
                return 6, self.tensor(pair.columns), self.tensor(rule.thresholds)
        raise TypeError(f"{rule!r} has no code: the operator resolves it before a backend sees it")

    def _offset(self, pair: Diagonal) -> int:
        # Beyond the matrix one offset is as good as another, and 32 bits hold this one.
        return self.number(min(max(pair.offset, -self._n), self._m))

    def number(self, value: int) -> int:
        if value not in self._found.numbers:
            self._found.numbers.append(value)
        return self._found.numbers.index(value)

    def tensor(self, tensor: Tensor) -> int:
        for index, known in enumerate(self._given):
            if known is tensor:
                return index
        self._given.append(tensor)
        self._found.tensors.append(tensor.resolve_neg().contiguous())
        return len(self._given) - 1
