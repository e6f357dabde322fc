"""Reductions as numbers and tensors: the form in which an operator of torch.library, in Python or C++, takes them.

Each reduction is `[dim, kind, weights, n_positive, n_exclude]` and three numbers for each rule, first the positive
rules, then the excluding ones. dim is 1 for a reduction of rows (over j) and 0 for one of columns; kind is 0
for LogSumExp, 1 for SoftplusSum, 2 for PairScore, whose pair is its one positive rule; weights is an index into the
tensors, or -1. A rule is its code and two numbers:

    Diagonal      0, offset, 0            Target              5, targets, 0
    SameId        1, rows, cols           Above a Diagonal    4, offset, thresholds
    DifferentId   2, rows, cols           Above a Target      6, targets, thresholds
    ColumnRange   3, start, stop

where targets, rows, cols and thresholds are indices into the tensors. csrc/cpu/plan.cpp reads the same.
"""

from __future__ import annotations

from torch import Tensor

from .reductions import (
    Above,
    ColumnRange,
    Diagonal,
    DifferentId,
    LogSumExp,
    PairRule,
    PairScore,
    Reduction,
    SameId,
    SoftplusSum,
    Target,
    rules_of,
)

#: (dim, reduction) in the order of the results: rows, then columns.
Plan = list[tuple[int, Reduction]]

_HEADER = 5
_PER_RULE = 3


def encode(rows: tuple[Reduction, ...], cols: tuple[Reduction, ...]) -> tuple[list[int], list[Tensor]]:
    """Numbers and tensors of a request. A tensor that several rules share is listed once."""
    numbers: list[int] = []
    tensors: list[Tensor] = []
    for dim, reductions in ((1, rows), (0, cols)):
        for reduction in reductions:
            _encode_reduction(dim, reduction, numbers, tensors)
    return numbers, tensors


def _encode_reduction(dim: int, reduction: Reduction, numbers: list[int], tensors: list[Tensor]) -> None:
    if isinstance(reduction, PairScore):
        numbers += (dim, 2, -1, 1, 0, *_encode_rule(reduction.pair, tensors))
        return
    kind, positive = (1, rules_of(reduction.positive)) if isinstance(reduction, SoftplusSum) else (0, ())
    exclude = rules_of(reduction.exclude)
    weights = -1 if reduction.weights is None else _index(reduction.weights, tensors)
    numbers += (dim, kind, weights, len(positive), len(exclude))
    for rule in (*positive, *exclude):
        numbers += _encode_rule(rule, tensors)


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


def decode(numbers: list[int], tensors: list[Tensor]) -> Plan:
    """The reductions that `encode` wrote down."""
    plan: Plan = []
    at = 0
    while at < len(numbers):
        dim, kind, weights, n_positive, n_exclude = numbers[at : at + _HEADER]
        at += _HEADER
        rules = [
            _decode_rule(numbers[k : k + _PER_RULE], tensors)
            for k in range(at, at + _PER_RULE * (n_positive + n_exclude), _PER_RULE)
        ]
        at += _PER_RULE * len(rules)
        positive, exclude = tuple(rules[:n_positive]), tuple(rules[n_positive:])
        known = None if weights < 0 else tensors[weights]
        plan.append((dim, _decode_reduction(kind, positive, exclude, known)))
    return plan


def _decode_reduction(
    kind: int, positive: tuple[PairRule, ...], exclude: tuple[PairRule, ...], weights: Tensor | None
) -> Reduction:
    match kind:
        case 0:
            return LogSumExp(exclude, weights)
        case 1:
            return SoftplusSum(positive, exclude, weights)
        case 2 if isinstance(positive[0], (Diagonal, Target)):
            return PairScore(positive[0])
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
