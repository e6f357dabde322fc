"""What can be asked of a similarity matrix: pair rules and reductions, as plain descriptions.

Nothing is computed here. Each backend reads these classes and knows how to serve them. A rule is evaluated tile
by tile from O(N) + O(M) metadata; a dense N x M mask is never asked for. *Owners* are what a reduction gives a
result for: the rows, or the columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Diagonal:
    """The pairs (i, i + offset): row i belongs to column i + offset.

    The offset places a shard's rows in a wider matrix: rows that start at `start` in the whole batch, against
    all columns, have their positives at `Diagonal(start)`. A row (column) whose partner lies outside the
    matrix has no pair. Both directions read the same offset: column j belongs to row j - offset.
    """

    offset: int = 0


def _same_position() -> Diagonal:
    # torch.compile traces a function as the factory of a default, but no class.
    return Diagonal()


@dataclass(frozen=True, eq=False)
class Target:
    """The pairs (i, columns[i]): row i belongs to the column that it names.

    Several rows may name one column, so a column has no pair of its own: `PairScore` and `AbovePositive` take a
    Target among the reductions of rows only. As `exclude` or `positive` it serves both directions.

    Args:
        columns: int64 [N], each below M; a negative entry: that row has no pair.
    """

    columns: Tensor


@dataclass(frozen=True, eq=False)
class SameId:
    """The pairs (i, j) with rows[i] == cols[j]: duplicates, several captions of one image, classes.

    Args:
        rows: int64 [N].
        cols: int64 [M].
    """

    rows: Tensor
    cols: Tensor


@dataclass(frozen=True, eq=False)
class DifferentId:
    """The pairs (i, j) with rows[i] != cols[j]; arguments as in `SameId`."""

    rows: Tensor
    cols: Tensor


@dataclass(frozen=True)
class ColumnRange:
    """All pairs with start <= j < stop: a queue, a block of hard negatives. Parts outside S name nothing."""

    start: int
    stop: int


@dataclass(frozen=True)
class AbovePositive:
    """The pairs with S_ij > S_own + margin, S_own being the score of the owner's own pair.

    Row i is the owner in a reduction of rows, column j in one of columns. The own pair itself never matches,
    and an owner without a pair matches nothing. No gradient goes through the comparison. S_own is taken in
    float64 and rounded once; a pair within rounding of the threshold may fall on either side.
    """

    margin: float = 0.0
    pair: Diagonal | Target = field(default_factory=_same_position)


@dataclass(frozen=True, eq=False)
class Above:
    """What the operator makes of `AbovePositive` before a backend sees it: S_ij > thresholds[owner], but for `pair`.

    Args:
        thresholds: one for each owner, in the dtype of the results; +inf for an owner without a pair.
        pair: the own pairs, which never match.
    """

    thresholds: Tensor
    pair: Diagonal | Target


PairRule = Diagonal | Target | SameId | DifferentId | ColumnRange | AbovePositive | Above
#: One rule, or the union of several.
PairRules = PairRule | tuple[PairRule, ...] | list[PairRule]


@dataclass(frozen=True, eq=False)
class LogSumExp:
    """log sum_j w_j exp(S_ij) over the allowed pairs: every pair but those of `exclude`.

    Excluded pairs count as an exact -inf. A row without an allowed pair gives -inf and has gradient 0.

    Args:
        exclude: a rule, or several: a pair that any of them names is left out.
        weights: w, a float tensor along the reduced axis, [M] for rows and [N] for columns, not negative and
            within a factor of 1e30 of each other; 0 leaves a pair out. No gradient goes to it.
    """

    exclude: PairRules | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SoftplusSum:
    """sum_j w_j softplus(-z_ij S_ij) with z = +1 for the pairs of `positive`, z = -1 for all others.

    A row without any pair gives 0.

    Args:
        positive: a rule, or several; None makes every pair a negative.
        exclude: pairs that are neither, as in `LogSumExp`.
        weights: as in `LogSumExp`.
    """

    positive: PairRules | None = field(default_factory=_same_position)
    exclude: PairRules | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PairScore:
    """S at the pair of each row (column). A row without a pair gives -inf and has gradient 0."""

    pair: Diagonal | Target = field(default_factory=_same_position)


Reduction = LogSumExp | SoftplusSum | PairScore


def rules_of(given: PairRules | None) -> tuple[PairRule, ...]:
    """The rules of an `exclude` or `positive`, however it was written."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)
