"""A plan as the kernels take it: constexpr fields, and the numbers and tensors that they point to.

A *field* is one function of the scores: the exponentials of the pairs that its rules leave, softplus terms, what lies
above a threshold. It serves a reduction of rows, one of columns, or both, which then share its exponentials. A *slot*
numbers the results of one direction: first the reductions that sum over every pair, then the pairs' own scores; the
largest scores are counted apart. A *source* is what fields look at: S, which is -1, or a teacher, by its number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..plan import Plan
from ..reductions import (
    Above,
    Chosen,
    ColumnRange,
    Count,
    Diagonal,
    DifferentId,
    Hinge,
    LogSumExp,
    Paced,
    PairRule,
    PairScore,
    SameId,
    Served,
    SoftmaxMean,
    SoftplusSum,
    Target,
    Teacher,
    rules_of,
)

Rule = tuple[int, int, int]


class Field(NamedTuple):
    """What the kernels read by position.

    Attributes:
        kind: as in `plan.py`.
        dim: whose thresholds and weights, the rows' (1) or the columns' (0).
        weights: index of a tensor, or -1.
        row, col: slot of the reduction that it serves in each direction, or -1.
        of, under: sources.
        extra: of a log-sum-exp where its pace starts in the factors, of a mean where its sharpness does, or -1; of a
            hinge and a count the index of the thresholds; of the largest scores k.
    """

    kind: int
    dim: int
    weights: int
    positive: tuple[Rule, ...]
    exclude: tuple[Rule, ...]
    row: int
    col: int
    of: int
    under: int
    extra: int

    @property
    def exponential(self) -> bool:
        return self.kind in (0, 3)

    @property
    def plain(self) -> bool:
        """Whether it is made of S alone by one function: what leaves registers for large tiles."""
        return self.kind in (0, 1) and self.of < 0 and self.extra < 0

    @property
    def sparse(self) -> bool:
        """Whether nearly every tile is spared the question which pairs count."""
        return self.weights < 0 and all(code in (0, 3) for code, *_ in (*self.positive, *self.exclude))


#: ((rule,), row slot or -1, column slot or -1)
Pair = tuple[tuple[Rule, ...], int, int]
#: (source, the fields that nothing is missing for once it is multiplied)
Step = tuple[int, tuple[Field, ...]]

_KINDS: dict[type, int] = {LogSumExp: 0, SoftplusSum: 1, SoftmaxMean: 3, Hinge: 4, Count: 5, Chosen: 6}
_LOG2E = math.log2(math.e)
# Rules that look at S.
_ABOVE = (4, 6)


@dataclass
class Fields:
    """What `STEPS`, `PAIRS`, `numbers`, `factors` and `tensors` of the kernels are.

    Attributes:
        steps, pairs: constants of the compilation.
        numbers: offsets and ends of ranges, at run time: another offset is, as a rule, no other kernel.
        factors: paces and sharpnesses, at run time too.
        tensors: ids, targets, thresholds, weights.
        teachers: by their numbers, the order in which they are multiplied.
        slots: of each reduction of the plan its slot in its direction.
        dense: how many slots are sums over every pair, by direction.
        chosen: the k of each slot of largest scores, by direction.
    """

    steps: tuple[Step, ...] = ()
    pairs: tuple[Pair, ...] = ()
    numbers: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    teachers: list[Teacher] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    dense: dict[int, int] = field(default_factory=lambda: {1: 0, 0: 0})
    chosen: dict[int, list[int]] = field(default_factory=lambda: {1: [], 0: []})

    @property
    def fields(self) -> tuple[Field, ...]:
        return tuple(each for _, fields in self.steps for each in fields)

    @property
    def weighted(self) -> bool:
        return any(each.exponential and each.weights >= 0 for each in self.fields)

    @property
    def means(self) -> bool:
        return any(each.kind == 3 for each in self.fields)

    @property
    def pressure(self) -> int:
        """On the registers, as `pick_config` has it, but for what a launch adds to it."""
        fields = self.fields
        if all(each.plain for each in fields):
            return 2 if len(fields) > 1 else 0
        return 2 if len(fields) > 1 and not all(each.sparse for each in fields) else 3


def fields_of(plan: Plan, n: int, m: int, filler: Tensor, *, backward: bool = False, scores: bool = False) -> Fields:
    """Sort a plan into fields, and the fields into steps.

    Args:
        filler: stands where there is no tensor: a tuple of none has no type.
        backward: whether gradients are made, which may need fewer sources; the plan then has nothing without one.
        scores: whether S is multiplied even if no field looks at it.
    """
    found = Fields()
    for dim, reduction in plan:
        found.dense[dim] += not isinstance(reduction, (PairScore, Chosen))
    next_dense, next_pair = {1: 0, 0: 0}, dict(found.dense)
    encoder = _Encoder(found, n, m)
    fields: dict[tuple[object, ...], list[int]] = {}
    pairs: list[Pair] = []
    for dim, reduction in plan:
        if isinstance(reduction, PairScore):
            slot = next_pair[dim]
            next_pair[dim] += 1
            pairs.append(((encoder.rule(reduction.pair),), *((slot, -1) if dim == 1 else (-1, slot))))
        else:
            if isinstance(reduction, Chosen):
                slot = len(found.chosen[dim])
                found.chosen[dim].append(reduction.k)
            else:
                slot = next_dense[dim]
                next_dense[dim] += 1
            key = encoder.key(dim, reduction)
            # A second reduction of the same direction asks for the same again, and gets a field of its own.
            while (slots := fields.setdefault(key, [-1, -1]))[1 - dim] >= 0:
                key = (*key, "again")
            slots[1 - dim] = slot
        found.slots.append(slot)
    listed = [Field(*key[:5], *slots, *key[5:8]) for key, slots in fields.items()]  # type: ignore[arg-type]
    found.steps, order = _scheduled(listed, len(encoder.teachers), backward, scores)
    found.teachers = [encoder.teachers[each] for each in order]
    found.pairs = tuple(pairs)
    found.numbers = found.numbers or [0]
    found.tensors = found.tensors or [filler]
    return found


def _sources(field: Field, backward: bool) -> set[int]:
    """What has to be multiplied for a field."""
    # The gradient of a mean of S under a teacher is its weights, whatever S is.
    of_scores_under_teacher = backward and field.kind == 3 and field.of < 0
    found = {field.under} if of_scores_under_teacher else {field.of, field.under} if field.kind == 3 else {field.of}
    return found | ({-1} if any(rule[0] in _ABOVE for rule in (*field.positive, *field.exclude)) else set())


def _scheduled(fields: list[Field], teachers: int, backward: bool, scores: bool) -> tuple[tuple[Step, ...], list[int]]:
    """The steps, and which teacher gets which number: they are numbered in the order in which they are multiplied.

    A teacher that nothing compares with S comes before S and the others behind it, so that as a rule no more than S,
    one teacher's similarity and the weights of the pairs are in registers.
    """
    needs = [_sources(each, backward) for each in fields]
    late = {source for each in needs if -1 in each for source in each}
    early = [each for each in range(teachers) if each not in late]
    order = early + [each for each in range(teachers) if each in late]
    sources = list(range(teachers))
    if scores or -1 in late:
        sources.insert(len(early), -1)
    number = {-1: -1} | {old: new for new, old in enumerate(order)}
    steps: list[list[Field]] = [[] for _ in sources]
    for each, needed in zip(fields, needs, strict=True):
        step = max(sources.index(number[source]) for source in needed)
        steps[step].append(each._replace(of=number[each.of], under=number[each.under]))
    return tuple(zip(sources, map(tuple, steps), strict=True)), order


class _Encoder:
    """Writes reductions and rules as numbers, and what these point to into `found` and `teachers`."""

    def __init__(self, found: Fields, n: int, m: int) -> None:
        self._found, self._n, self._m = found, n, m
        self._given: list[Tensor] = []
        self._starts: dict[tuple[float, ...], int] = {}
        self.teachers: list[Teacher] = []

    def key(self, dim: int, reduction: Served) -> tuple[object, ...]:
        """A field's (kind, dim, weights, positive, exclude, of, under, extra), equal for what rows and columns share."""
        positive: tuple[Rule, ...] = ()
        weights = of = under = extra = -1
        if isinstance(reduction, SoftplusSum):
            positive = self.rules(reduction.positive)
        assert not isinstance(reduction, PairScore)
        exclude = self.rules(reduction.exclude)
        if not isinstance(reduction, Chosen) and reduction.weights is not None:
            weights = self.tensor(reduction.weights)
        if isinstance(reduction, (Hinge, Count)):
            extra = self.tensor(reduction.thresholds)
        elif isinstance(reduction, Chosen):
            of, extra = self._teacher(reduction.of), reduction.k
        elif isinstance(reduction, SoftmaxMean):
            of, under = self._teacher(reduction.of), self._teacher(reduction.under)
            extra = self._sharpness(reduction.sharpness)
        elif isinstance(reduction, LogSumExp):
            if isinstance(reduction.of, Paced):
                extra = self._pace(reduction.of)
            else:
                of = self._teacher(reduction.of)
        thresholds = isinstance(reduction, (Hinge, Count)) or any(rule[0] in _ABOVE for rule in (*positive, *exclude))
        owned = weights >= 0 or thresholds
        return _KINDS[type(reduction)], dim if owned else 1, weights, positive, exclude, of, under, extra

    def _teacher(self, teacher: Teacher | None) -> int:
        if teacher is None:
            return -1
        if teacher not in self.teachers:
            self.teachers.append(teacher)
        return self.teachers.index(teacher)

    def _pace(self, pace: Paced) -> int:
        """Where (gain, slope, offset, center) start, as a function of scores in base 2 that is in base 2 itself."""
        return self._factors(pace.gain, pace.slope / _LOG2E, pace.offset, pace.center * _LOG2E)

    def _sharpness(self, sharpness: float) -> int:
        return -1 if sharpness == 1 else self._factors(sharpness)

    def _factors(self, *given: float) -> int:
        if given not in self._starts:
            self._starts[given] = len(self._found.factors)
            self._found.factors += map(float, given)
        return self._starts[given]

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
