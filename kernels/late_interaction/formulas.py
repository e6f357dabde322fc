"""The dense formulas of a block of pairs of token sets: the oracle of the tests, and, block by block, the torch backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .pooling import AttentionPooling, LogSumExpPooling, MaxPooling, Pooling, SoftmaxPooling, TopMeanPooling


@dataclass(eq=False)
class Block:
    """Some sets x, each beside some sets y. Tokens that do not count are zero.

    Attributes:
        x: [n, Lx, D].
        x_mask: bool [n, Lx].
        y: [1, m, Ly, D], the same for all x; or [n, m, Ly, D], those of each x.
        y_mask: bool [1, m, Ly] or [n, m, Ly].
    """

    x: Tensor
    x_mask: Tensor
    y: Tensor
    y_mask: Tensor
    _similarity: Tensor | None = None

    @property
    def x_empty(self) -> Tensor:
        """bool [n, 1]."""
        return ~self.x_mask.any(1, keepdim=True)

    @property
    def y_empty(self) -> Tensor:
        """bool [1 or n, m]."""
        return ~self.y_mask.any(2)

    @property
    def similarity(self) -> Tensor:
        """[n, m, Lx, Ly]: the dot products of all tokens, made once."""
        if self._similarity is None:
            self._similarity = self._product()
        return self._similarity

    def _product(self) -> Tensor:
        n, lx, width = self.x.shape
        a, m, ly, _ = self.y.shape
        if a == 1:
            product = self.x.reshape(n * lx, width) @ self.y.reshape(m * ly, width).T
        else:
            product = self.x @ self.y.reshape(n, m * ly, width).transpose(1, 2)
        return product.view(n, lx, m, ly).transpose(1, 2)

    def turned(self) -> Block:
        """The same pairs with the sides exchanged, as [m, n] blocks; for y the same for all x."""
        if self.y.shape[0] != 1:
            raise ValueError("pairs of candidates cannot be turned")
        return Block(self.y[0], self.y_mask[0], self.x[None], self.x_mask[None])


#: (block, numbers, shared tensors) -> scores, each [n, m]. Numbers and tensors are the same for all blocks.
Formula = Callable[[Block, Sequence[float], Sequence[Tensor]], tuple[Tensor, ...]]

#: Those that `blocks.over_pairs` can be asked for, by name: an operator's schema has no room for a function.
FORMULAS: dict[str, Formula] = {}


def formula(function: Formula) -> Formula:
    """Register a formula under its name."""
    FORMULAS[function.__name__] = function
    return function


def pooled(block: Block, pooling: Pooling) -> Tensor:
    """[n, m, Lx]: for each token of x the similarities with the tokens of y, pooled. Where y is empty the numbers mean nothing."""
    empty = block.y_empty[:, :, None, None]
    # All of an empty set count, so that its gradient is a number; its score is replaced.
    allowed = block.y_mask[:, :, None, :] | empty
    return _pool(block.similarity, allowed, block.x, block.y, pooling)


def pooled_back(block: Block, pooling: Pooling) -> Tensor:
    """[n, m, Ly]: for each token of y the similarities with the tokens of x, pooled. Where x is empty they mean nothing."""
    allowed = block.x_mask[:, None, None, :] | block.x_empty[:, :, None, None]
    if isinstance(pooling, AttentionPooling):
        turned = block.turned()
        return pooled(turned, pooling).transpose(0, 1)
    return _pool(block.similarity.transpose(2, 3), allowed, block.x, block.y, pooling)


def _pool(similarity: Tensor, allowed: Tensor, x: Tensor, y: Tensor, pooling: Pooling) -> Tensor:
    """Over the last dimension of [n, m, Lx, Ly]; x and y themselves are needed where tokens, not numbers, are pooled."""
    if not similarity.shape[-1]:
        return similarity.new_zeros(similarity.shape[:-1])
    masked = similarity.masked_fill(~allowed, -torch.inf)
    match pooling:
        case MaxPooling():
            return masked.max(-1).values  # with an index, so that the gradient goes to the first of equals
        case TopMeanPooling(k):
            largest = masked.sort(dim=-1, descending=True, stable=True).values[..., :k]
            counted = torch.arange(largest.shape[-1], device=masked.device) < allowed.sum(-1, keepdim=True)
            return largest.where(counted, 0).sum(-1) / counted.sum(-1)
        case SoftmaxPooling(temperature):
            weights = (masked / temperature).softmax(-1)
            return (weights * similarity).sum(-1)
        case LogSumExpPooling(temperature):
            return temperature * (masked / temperature).logsumexp(-1)
        case AttentionPooling(temperature):
            weights = (masked / temperature).softmax(-1)
            vectors = weights @ (y if y.shape[0] > 1 else y.expand(len(x), -1, -1, -1))  # [n, m, Lx, D]
            return F.cosine_similarity(x[:, None], vectors, dim=-1)
    raise TypeError(f"{pooling!r}: the operator checks it before a formula sees it")


def row_scores(block: Block, pooling: Pooling) -> Tensor:
    """[n, m]: sum over the tokens of x. An empty y gives -inf; else an empty x gives 0. Neither has a gradient."""
    terms = pooled(block, pooling).masked_fill(~block.x_mask[:, None], 0)
    return terms.sum(-1).masked_fill(block.y_empty, -torch.inf)


def col_scores(block: Block, pooling: Pooling) -> Tensor:
    """[n, m]: sum over the tokens of y. An empty x gives -inf; else an empty y gives 0."""
    terms = pooled_back(block, pooling).masked_fill(~block.y_mask, 0)
    return terms.sum(-1).masked_fill(block.x_empty, -torch.inf)


_KINDS = (MaxPooling, TopMeanPooling, SoftmaxPooling, LogSumExpPooling, AttentionPooling)


def encode_pooling(pooling: Pooling) -> tuple[float, float]:
    """A pooling as two numbers."""
    match pooling:
        case TopMeanPooling(k):
            return 1.0, float(k)
        case SoftmaxPooling(value) | LogSumExpPooling(value) | AttentionPooling(value):
            return float(_KINDS.index(type(pooling))), float(value)
    return 0.0, 0.0


def decode_pooling(kind: float, value: float) -> Pooling:
    match _KINDS[int(kind)].__name__:
        case "MaxPooling":
            return MaxPooling()
        case "TopMeanPooling":
            return TopMeanPooling(int(value))
        case "SoftmaxPooling":
            return SoftmaxPooling(value)
        case "LogSumExpPooling":
            return LogSumExpPooling(value)
    return AttentionPooling(value)


@formula
def pooled_sums(block: Block, numbers: Sequence[float], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Row scores, column scores, or both. Numbers: a pooling as `encode_pooling` gives it, rows or not, columns or not."""
    pooling = decode_pooling(numbers[0], numbers[1])
    scores = []
    if numbers[2]:
        scores.append(row_scores(block, pooling))
    if numbers[3]:
        scores.append(col_scores(block, pooling))
    return tuple(scores)
