"""The mutual guidance of frames and words: a softmax over one side's tokens, then one over the other's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .formulas import Block, formula, pooled, pooled_back
from .pair_formulas import check_positive, counted, pair_scores, replaced
from .pooling import SoftmaxPooling

_FORMS = ("full", "simple")


def mug_similarity(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    form: str = "full",
    temperature: float = 0.01,
    memory_budget: int | None = None,
) -> Tensor:
    """Similarity of two sets whose tokens weigh each other twice: the Mug of Mug-STAN (arXiv:2311.15075).

    With s_pr = <x_ip, y_jr> and T the temperature, every token first pools the other side,

        a_p = sum_r softmax_r(s_pr / T) s_pr        b_r = sum_p softmax_p(s_pr / T) s_pr,

    and then tokens are weighed by what they found, u = softmax_p(a / T) and v = softmax_r(b / T):

        form="full":    <sum_p u_p x_ip, sum_r v_r y_jr>
        form="simple":  (sum_p u_p a_p + sum_r v_r b_r) / 2

    The first is u^T s v, so that no pooled vector is stored for a pair. The authors' code takes a similarity of exactly 0 for
    padding and has no mask for frames; here masks say what is padding, on both sides.

    Args:
        x: [N, Lx, D], words, say; unit vectors in the paper.
        y: [M, Ly, D], frames; or [N, K, Ly, D], K candidates of each x.
        x_mask, y_mask: bool, of the tokens' shapes without D, True for tokens that count; None: all.
        form: "full" or "simple".
        temperature: above 0; the paper's code has tau = 100, its reciprocal.
        memory_budget: bytes for a block of pairs and what its backward keeps.

    Returns:
        [N, M] or [N, K], float32 (float64 for float64 tokens). -inf for an empty y, else 0 for an empty x, without gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, masks or devices that do not fit, or options out of their range.
    """
    if form not in _FORMS:
        raise ValueError(f"form={form!r}: expected one of {', '.join(_FORMS)}")
    check_positive(temperature=temperature)
    numbers = temperature, _FORMS.index(form)
    return pair_scores("mug", x, y, x_mask, y_mask, numbers=numbers, copies=12, memory_budget=memory_budget)


@formula
def mug(block: Block, numbers: Sequence[float], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Numbers: the temperature, the form."""
    temperature, simple = numbers
    similarity = block.similarity
    if not similarity.shape[2] or not similarity.shape[3]:
        return (replaced(similarity.sum((2, 3)), block),)
    of_x, of_y = counted(block)
    pooling = SoftmaxPooling(temperature)
    a, b = pooled(block, pooling), pooled_back(block, pooling)
    u, v = ((each / temperature).masked_fill(~mask, -torch.inf).softmax(-1) for each, mask in ((a, of_x), (b, of_y)))
    if simple:
        scores = ((u * a).sum(-1) + (v * b).sum(-1)) / 2
    else:
        scores = ((u.unsqueeze(-2) @ similarity).squeeze(-2) * v).sum(-1)
    return (replaced(scores, block),)
