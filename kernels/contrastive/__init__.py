"""Reductions of S = scale * x y^T + bias along rows and columns, without storing S."""

from .operator import similarity_reduce
from .reductions import Diagonal, LogSumExp, PairScore, Reduction, SoftplusSum

__all__ = ["Diagonal", "LogSumExp", "PairScore", "Reduction", "SoftplusSum", "similarity_reduce"]
