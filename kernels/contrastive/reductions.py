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
    float64 and rounded once; a pair within rounding of the threshold may fall on either side. The margin is in the
    unit of S: a number, or a tensor of shape [], such as a multiple of a learned scale.
    """

    margin: float | Tensor = 0.0
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


@dataclass(frozen=True, eq=False)
class Teacher:
    """A second similarity of the same pairs, T_ij = scale_i <x_i, y_j>, to which no gradient goes.

    Reductions that name one teacher share its products, so make one object for each teacher. Its features are
    multiplied in the dtype of S's own, to which they are converted.

    Args:
        x: [N, D'], its embeddings of the rows; any floating dtype, any width.
        y: [M, D'], its embeddings of the columns.
        scale: a float, or a tensor of shape [] or [1], or [N] for a temperature of each row's own.
    """

    x: Tensor
    y: Tensor
    scale: float | Tensor = 1.0


@dataclass(frozen=True)
class Paced:
    """A score that paces itself: gain * relu(slope * S + offset) * (S - center), the relu taken without gradient.

    The circle loss (arXiv:2002.10857) with relaxation m and gain g takes Paced(g, 1, m, m) of its negatives
    and Paced(-g, -1, 1 + m, 1 - m) of its positives.
    """

    gain: float
    slope: float
    offset: float
    center: float


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
        of: None for S; a `Teacher`, whose result has no gradient; or `Paced(...)`, for that function of S.
    """

    exclude: PairRules | None = None
    weights: Tensor | None = None
    of: Teacher | Paced | None = None


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


@dataclass(frozen=True, eq=False)
class SoftmaxMean:
    """sum_j p_ij A_ij with p_ij = w_j exp(k B_ij) / sum_j w_j exp(k B_ij): the expectation of A under the softmax of B.

    A and B are S or a teacher each. The gradient goes through both, but to no teacher: the cross-entropy against
    a teacher's softmax is LogSumExp() - SoftmaxMean(under=teacher), and SoftmaxMean(sharpness=k) is the mean of S
    weighted by its own softmax. A row without an allowed pair gives 0 and has gradient 0.

    Args:
        of: A: None for S, or a `Teacher`.
        under: B: None for S, or a `Teacher`.
        sharpness: k, of either sign.
        exclude: as in `LogSumExp`.
        weights: as in `LogSumExp`.
    """

    of: Teacher | None = None
    under: Teacher | None = None
    sharpness: float = 1.0
    exclude: PairRules | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HingeSum:
    """sum_j w_j relu(margin + S_ij - S_own) over all pairs but the owner's own, which never counts, and `exclude`.

    Row i's own score is S at its pair; column j's at the column's. The gradient goes to both scores. Where an owner
    has no pair the sum is 0. S_own is taken in float64 and rounded once.

    Args:
        margin: how far below the own pair the others should lie.
        pair: the own pairs.
        exclude: as in `LogSumExp`.
        weights: as in `LogSumExp`.
    """

    margin: float = 0.2
    pair: Diagonal | Target = field(default_factory=_same_position)
    exclude: PairRules | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class CountAbove:
    """How many pairs have S_ij > S_own + margin, weighted by w_j: 0 of them is a hit at 1. No gradient.

    Arguments as in `HingeSum`. The result is a float; an owner without a pair counts 0.
    """

    margin: float = 0.0
    pair: Diagonal | Target = field(default_factory=_same_position)
    exclude: PairRules | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TopK:
    """The k largest S_ij of each owner, [owners, k], largest first; among equals the lowest index comes first.

    The gradient goes to the chosen pairs. Where fewer than k pairs are allowed the rest is -inf, with gradient 0.

    Args:
        k: from 1 to 1024.
        exclude: as in `LogSumExp`.
        of: None for S, or a `Teacher`, whose result has no gradient.
    """

    k: int
    exclude: PairRules | None = None
    of: Teacher | None = None


@dataclass(frozen=True, eq=False)
class ArgTopK:
    """The indices of `TopK`, int64 [owners, k], -1 where there is no pair. Arguments as there. No gradient."""

    k: int
    exclude: PairRules | None = None
    of: Teacher | None = None


@dataclass(frozen=True, eq=False)
class Max:
    """`TopK` with k = 1, as a vector [owners]."""

    exclude: PairRules | None = None
    of: Teacher | None = None


@dataclass(frozen=True, eq=False)
class ArgMax:
    """`ArgTopK` with k = 1, as a vector [owners]: the lowest index of a largest score."""

    exclude: PairRules | None = None
    of: Teacher | None = None


# ---- what the operator makes of some of them before a backend sees it ------------------------------------------------


@dataclass(frozen=True, eq=False)
class Hinge:
    """sum_j w_j relu(S_ij - thresholds[owner]) over the allowed pairs. No gradient goes to the thresholds.

    Args:
        thresholds: one for each owner, in the dtype of the results; +inf for an owner without a pair.
        exclude, weights: as in `LogSumExp`.
    """

    thresholds: Tensor
    exclude: PairRules | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Count:
    """sum_j w_j [S_ij > thresholds[owner]] over the allowed pairs, without gradient. Arguments as in `Hinge`."""

    thresholds: Tensor
    exclude: PairRules | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Chosen:
    """The k largest scores of each owner and their indices: two results, both [owners, k], neither with a gradient.

    (`chosen.py` gives the scores theirs, which is sparse.) Arguments as in `TopK`.
    """

    k: int
    exclude: PairRules | None = None
    of: Teacher | None = None


Reduction = LogSumExp | SoftplusSum | PairScore | SoftmaxMean | HingeSum | CountAbove | TopK | ArgTopK | Max | ArgMax
#: What a backend serves.
Served = LogSumExp | SoftplusSum | PairScore | SoftmaxMean | Hinge | Count | Chosen


def rules_of(given: PairRules | None) -> tuple[PairRule, ...]:
    """The rules of an `exclude` or `positive`, however it was written."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)
