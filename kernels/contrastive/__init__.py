"""Reductions of S = scale * x y^T + bias along rows and columns, without storing S."""

from .operator import similarity_reduce
from .reductions import (
    AbovePositive,
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
)

__all__ = [
    "AbovePositive",
    "ColumnRange",
    "Diagonal",
    "DifferentId",
    "LogSumExp",
    "PairRule",
    "PairScore",
    "Reduction",
    "SameId",
    "SoftplusSum",
    "Target",
    "similarity_reduce",
]
