"""Reductions as numbers and tensors: the form in which an operator of torch.library, in Python or C++, takes them.

Each reduction is eight numbers, `[dim, kind, weights, n_positive, n_exclude, of, under, extra]`, and three more for each
rule, first the positive rules, then the excluding ones. dim is 1 for a reduction of rows (over j) and 0 for one of
columns; weights is an index into the tensors, or -1; of and under are -1 for S, or the index of a teacher's first tensor,
which its second and third, (x, y, scale), follow. The kinds, and what `extra` is:

    0  LogSumExp       where its pace starts in the factors (gain, slope, offset, center), or -1
    1  SoftplusSum     -1
    2  PairScore       -1; the pair is its one positive rule
    3  SoftmaxMean     as in LogSumExp, of `under`: the sharpness k is (k, 0, 1, 0), and 1 is -1
    4  Hinge           index of the thresholds
    5  Count           index of the thresholds
    6  Chosen          k; it has two results, scores and indices

A rule is its code and two numbers:

    Diagonal      0, offset, 0            Target              5, targets, 0
    SameId        1, rows, cols           Above a Diagonal    4, offset, thresholds
    DifferentId   2, rows, cols           Above a Target      6, targets, thresholds
    ColumnRange   3, start, stop

where targets, rows, cols and thresholds are indices into the tensors. csrc/cpu/decode_plan.cpp reads the same.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .reductions import (
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

#: (dim, reduction) in the order of the results: rows, then columns.
Plan = list[tuple[int, Served]]

_HEADER = 8
_PER_RULE = 3
_KINDS: dict[type, int] = {
    LogSumExp: 0,
    SoftplusSum: 1,
    PairScore: 2,
    SoftmaxMean: 3,
    Hinge: 4,
    Count: 5,
    Chosen: 6,
}


class Encoded(NamedTuple):
    """A request in the arguments of an operator: int[], float[] and Tensor[]."""

    numbers: list[int]
    factors: list[float]
    tensors: list[Tensor]


def result_count(reduction: Served) -> int:
    """How many results a backend gives for it."""
    return 2 if isinstance(reduction, Chosen) else 1


def has_gradient(reduction: Served) -> bool:
    """Whether a gradient comes back to S from its results by a sweep: `Chosen` has one of its own (`chosen.py`)."""
    if isinstance(reduction, LogSumExp):
        return not isinstance(reduction.of, Teacher)
    if isinstance(reduction, SoftmaxMean):
        return reduction.of is None or reduction.under is None
    return not isinstance(reduction, (Count, Chosen))


def encode(rows: tuple[Served, ...], cols: tuple[Served, ...]) -> Encoded:
    """Numbers and tensors of a request. A tensor that several rules share is listed once."""
    found = Encoded([], [], [])
    for dim, reductions in ((1, rows), (0, cols)):
        for reduction in reductions:
            _encode_reduction(dim, reduction, found)
    return found


def _encode_reduction(dim: int, reduction: Served, found: Encoded) -> None:
    numbers, factors, tensors = found
    if isinstance(reduction, PairScore):
        numbers += (dim, 2, -1, 1, 0, -1, -1, -1, *_encode_rule(reduction.pair, tensors))
        return
    positive: tuple[PairRule, ...] = ()
    of = under = extra = -1
    if isinstance(reduction, LogSumExp):
        if isinstance(reduction.of, Paced):
            extra = _extend(factors, reduction.of)
        else:
            of = _encode_teacher(reduction.of, tensors)
    elif isinstance(reduction, SoftplusSum):
        positive = rules_of(reduction.positive)
    elif isinstance(reduction, SoftmaxMean):
        of, under = _encode_teacher(reduction.of, tensors), _encode_teacher(reduction.under, tensors)
        if reduction.sharpness != 1:
            extra = _extend(factors, Paced(reduction.sharpness, 0.0, 1.0, 0.0))
    elif isinstance(reduction, Chosen):
        of, extra = _encode_teacher(reduction.of, tensors), reduction.k
    else:
        extra = _index(reduction.thresholds, tensors)
    weighed = None if isinstance(reduction, Chosen) else reduction.weights
    weights = -1 if weighed is None else _index(weighed, tensors)
    exclude = rules_of(reduction.exclude)
    numbers += (dim, _KINDS[type(reduction)], weights, len(positive), len(exclude), of, under, extra)
    for rule in (*positive, *exclude):
        numbers += _encode_rule(rule, tensors)


def _extend(factors: list[float], pace: Paced) -> int:
    factors += (pace.gain, pace.slope, pace.offset, pace.center)
    return len(factors) - 4


def _encode_teacher(teacher: Teacher | None, tensors: list[Tensor]) -> int:
    """The index of its x; its y and its scale follow, even where a tensor is listed already."""
    if teacher is None:
        return -1
    assert isinstance(teacher.scale, Tensor), "the operator resolves it before a backend sees it"
    three = (teacher.x, teacher.y, teacher.scale)
    for index in range(len(tensors) - 2):
        if all(known is each for known, each in zip(tensors[index : index + 3], three, strict=True)):
            return index
    tensors += three
    return len(tensors) - 3


def _encode_rule(rule: PairRule, tensors: list[Tensor]) -> tuple[int, int, int]:
    # Not `match`: this runs on every call, and nearly every rule is the first one.
    if isinstance(rule, Diagonal):
        return 0, rule.offset, 0
    if isinstance(rule, SameId):
        return 1, _index(rule.rows, tensors), _index(rule.cols, tensors)
    if isinstance(rule, DifferentId):
        return 2, _index(rule.rows, tensors), _index(rule.cols, tensors)
    if isinstance(rule, ColumnRange):
        return 3, rule.start, rule.stop
    if isinstance(rule, Target):
        return 5, _index(rule.columns, tensors), 0
    if isinstance(rule, Above):
        if isinstance(rule.pair, Diagonal):
            return 4, rule.pair.offset, _index(rule.thresholds, tensors)
        return 6, _index(rule.pair.columns, tensors), _index(rule.thresholds, tensors)
    raise TypeError(f"{rule!r} has no code: the operator resolves it before a backend sees it")


def _index(tensor: Tensor, tensors: list[Tensor]) -> int:
    for index, known in enumerate(tensors):
        if known is tensor:
            return index
    tensors.append(tensor)
    return len(tensors) - 1


def decode(numbers: list[int], factors: list[float], tensors: list[Tensor]) -> Plan:
    """The reductions that `encode` wrote down. One teacher becomes one object."""
    plan: Plan = []
    teachers: dict[int, Teacher | None] = {-1: None}
    at = 0
    while at < len(numbers):
        dim, kind, weights, n_positive, n_exclude, of, under, extra = numbers[at : at + _HEADER]
        at += _HEADER
        rules = [
            _decode_rule(numbers[k : k + _PER_RULE], tensors)
            for k in range(at, at + _PER_RULE * (n_positive + n_exclude), _PER_RULE)
        ]
        at += _PER_RULE * len(rules)
        positive, exclude = tuple(rules[:n_positive]), tuple(rules[n_positive:])
        known = None if weights < 0 else tensors[weights]
        for each in (of, under):
            if each not in teachers:
                teachers[each] = Teacher(tensors[each], tensors[each + 1], tensors[each + 2])
        plan.append(
            (
                dim,
                _decode_reduction(
                    kind, positive, exclude, known, teachers[of], teachers[under], extra, factors, tensors
                ),
            )
        )
    return plan


def _decode_reduction(
    kind: int,
    positive: tuple[PairRule, ...],
    exclude: tuple[PairRule, ...],
    weights: Tensor | None,
    of: Teacher | None,
    under: Teacher | None,
    extra: int,
    factors: list[float],
    tensors: list[Tensor],
) -> Served:
    match kind:
        case 0:
            return LogSumExp(exclude, weights, of if extra < 0 else Paced(*factors[extra : extra + 4]))
        case 1:
            return SoftplusSum(positive, exclude, weights)
        case 2 if isinstance(positive[0], (Diagonal, Target)):
            return PairScore(positive[0])
        case 3:
            return SoftmaxMean(of, under, 1.0 if extra < 0 else factors[extra], exclude, weights)
        case 4:
            return Hinge(tensors[extra], exclude, weights)
        case 5:
            return Count(tensors[extra], exclude, weights)
        case 6:
            return Chosen(extra, exclude, of)
    raise ValueError(f"no reduction has the kind {kind}")


def _decode_rule(numbers: list[int], tensors: list[Tensor]) -> PairRule:
    code, a, b = numbers
    match code:
        case 0:
            return Diagonal(a)
        case 1:
            return SameId(tensors[a], tensors[b])
        case 2:
            return DifferentId(tensors[a], tensors[b])
        case 3:
            return ColumnRange(a, b)
        case 4:
            return Above(tensors[b], Diagonal(a))
        case 5:
            return Target(tensors[a])
        case 6:
            return Above(tensors[b], Target(tensors[a]))
    raise ValueError(f"no rule has the code {code}")
