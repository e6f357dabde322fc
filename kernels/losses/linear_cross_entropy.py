"""The cross-entropy of a language-model head, without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contrastive.arguments import FEATURE_DTYPES, described
from ..contrastive.reductions import Target
from ..contrastive.sums import cross_entropies, cross_entropy_sum
from .base import check_matrix, check_reduction, check_scalar


def linear_cross_entropy(
    hidden: Tensor,
    vocabulary: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float | Tensor = 1.0,
    memory_budget: int | None = None,
) -> Tensor:
    """`F.cross_entropy(scale * hidden @ vocabulary.T + bias, targets)` in O(tokens + vocabulary) memory.

    The vocabulary is the columns of a similarity matrix, and the loss of token i is
    softplus(log sum_{v != t_i} exp(S_iv) - S_i,t_i), the sum running over the vocabulary: the [tokens, V] logits,
    often the largest tensor of a training step, never exist, nor does their gradient. The idea is that of Cut
    Cross-Entropy (arXiv:2411.09009); nothing is skipped or filtered here, so the gradient is exact. Ignored
    tokens are taken out before the sweep and cost nothing (under torch.compile, which wants fixed shapes, they
    stay and weigh 0).

    Args:
        hidden: [..., D], the last hidden states; float16, bfloat16, float32 or float64.
        vocabulary: [V, D], the weight of the head (`lm_head.weight`).
        targets: [...], int64, each from 0 to V - 1 or `ignore_index`. Shift them beforehand if the model predicts
            the next token.
        bias: [V], the bias of the head.
        ignore_index: the target of tokens without a loss.
        reduction: "mean" over the tokens that are not ignored, "sum", or "none".
        scale: a factor of the products (not of the bias), a float or a tensor of shape [] or [1].
        memory_budget: as in `similarity_reduce`.

    Returns:
        A scalar, or [...] for reduction="none" with 0 for ignored tokens; float32 (float64 for float64 inputs),
        differentiable in hidden, vocabulary, bias and scale. As in torch the mean is NaN if all are ignored.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a target outside the vocabulary (under
            torch.compile an assertion in the graph).
    """
    _check_shapes(hidden, vocabulary, targets, bias)
    check_reduction(reduction)
    check_scalar("scale", scale)
    rows, columns = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.reshape(-1)
    counted = columns != ignore_index
    if torch.compiler.is_compiling():
        count: int | Tensor = counted.sum()
        inside = (columns >= 0) & (columns < vocabulary.shape[0])
        torch._assert_async((inside | ~counted).all(), "targets: an entry is neither in the vocabulary nor ignored")
        columns = columns.masked_fill(~counted, -1)
    else:
        if not counted.all():
            rows, columns = rows[counted], columns[counted]
        count = len(columns)
        _check_range(columns, vocabulary.shape[0], ignore_index)
    # Inside the operator the weight costs nothing; after it, the gradient of the vocabulary is scaled once more.
    weight = 1 / max(1, count) if reduction == "mean" and isinstance(count, int) else 1.0
    pair = Target(columns)
    if reduction != "none" and bias is None:
        total = cross_entropy_sum(
            rows, vocabulary, scale=scale, pair=pair, row_weight=weight, memory_budget=memory_budget
        )
        return total if reduction == "sum" else _mean(total, count)
    terms, _ = cross_entropies(rows, vocabulary, scale=scale, pair=pair, col_bias=bias, memory_budget=memory_budget)
    assert terms is not None
    if reduction != "none":
        return terms.sum() if reduction == "sum" else _mean(weight * terms.sum(), count)
    if len(terms) < len(counted):
        terms = terms.new_zeros(len(counted)).masked_scatter(counted, terms)
    return terms.reshape(targets.shape)


def _mean(total: Tensor, count: int | Tensor) -> Tensor:
    """NaN without any token, where the gradient is 0; a count that is a tensor has not been divided by yet."""
    if isinstance(count, int):
        return total if count else total + torch.nan
    return total / count.clamp(min=1) + torch.where(count == 0, torch.nan, 0.0)


def _check_shapes(hidden: Tensor, vocabulary: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    check_matrix("vocabulary", vocabulary)
    if not isinstance(hidden, Tensor) or hidden.dtype not in FEATURE_DTYPES:
        given = hidden.dtype if isinstance(hidden, Tensor) else type(hidden).__name__
        raise TypeError(f"hidden is {given}: expected a float16, bfloat16, float32 or float64 tensor")
    if hidden.dim() == 0 or hidden.shape[-1] != vocabulary.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and vocabulary {list(vocabulary.shape)} differ in their last dimension: "
            "expected [..., D] and [V, D]"
        )
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        given = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets is {given}: expected an int64 tensor of indices into the vocabulary")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets has shape {list(targets.shape)}: expected {list(hidden.shape[:-1])}, one for each hidden state"
        )
    if bias is not None and (
        not isinstance(bias, Tensor) or not bias.is_floating_point() or bias.shape != vocabulary.shape[:1]
    ):
        raise ValueError(
            f"bias is {described(bias)}: expected a floating point tensor of shape [{vocabulary.shape[0]}], one for "
            "each row of the vocabulary"
        )


def _check_range(columns: Tensor, size: int, ignore_index: int) -> None:
    if len(columns) == 0:
        return
    least, most = (int(end) for end in columns.aminmax())
    if least < 0 or most >= size:
        wrong = least if least < 0 else most
        raise ValueError(
            f"targets holds {wrong}: expected 0 to {size - 1}, rows of the vocabulary, or ignore_index={ignore_index}"
        )
