"""What can be asked of a similarity matrix: pair rules and reductions, as plain descriptions.

Nothing is computed here. Each backend reads these classes and knows how to serve them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Diagonal:
    """The pairs (i, i + offset): row i belongs to column i + offset.

    The offset places a shard's rows in a wider matrix: rows that start at `start` in the whole batch, against
    all columns, have their positives at `Diagonal(start)`. A row (column) whose partner lies outside the
    matrix has no pair. Both directions read the same offset: column j belongs to row j - offset.
    """

    offset: int = 0


@dataclass(frozen=True)
class LogSumExp:
    """log sum_j exp(S_ij) over the allowed pairs: every pair but those of `exclude`.

    Excluded pairs count as an exact -inf. A row without an allowed pair gives -inf and has gradient 0.
    """

    exclude: Diagonal | None = None


@dataclass(frozen=True)
class SoftplusSum:
    """sum_j softplus(-z_ij S_ij) with z = +1 for the pairs of `positive`, z = -1 for all others.

    `positive=None` makes every pair a negative. A row without any pair gives 0.
    """

    positive: Diagonal | None = field(default_factory=Diagonal)


@dataclass(frozen=True)
class PairScore:
    """S at the pair of each row (column). A row without a pair gives -inf and has gradient 0."""

    pair: Diagonal = field(default_factory=Diagonal)


Reduction = LogSumExp | SoftplusSum | PairScore
