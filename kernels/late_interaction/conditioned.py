"""Attention pooling of one side by the other, for all pairs: a video's frames as a text sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive.arguments import described
from .formulas import Block, formula
from .pair_formulas import check_positive, pair_scores
from .token_sets import check_mask


class Context(NamedTuple):
    """A modality that texts attend to.

    Attributes:
        keys: [M, L, P], of the width of the queries.
        values: [M, L, D], of the width of the vectors they are compared with.
        mask: bool [M, L], True for tokens that count; None: all.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


def conditioned_similarity(
    x: Tensor,
    queries: Tensor,
    *contexts: Context,
    temperature: float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """cos(x_i, z_ij) with z_ij = sum over modalities of softmax_l(<query_i, key_jl> / temperature) value_jl, for all pairs.

    Text-conditioned pooling: X-Pool (arXiv:2203.15086) has one modality, the frames, TEFAL (arXiv:2307.12964) adds the audio's
    pooled vector to theirs. The learned projections are the caller's: queries, keys and values are linear in tokens, so
    they are no larger than tokens, and gradients reach the projections through them. Neither the weights [N, M, L] nor the
    pooled vectors [N, M, D] are stored. What those papers apply to the pooled vector itself, layer norms and a linear layer,
    is left out; a linear layer alone belongs into the values.

    Args:
        x: [N, D], texts.
        queries: [N, P], the texts' queries.
        contexts: one or several, of the same M samples.
        temperature: above 0; None: sqrt(P).
        memory_budget: bytes for a block of pairs and what its backward keeps.

    Returns:
        [N, M], float32 (float64 for float64 inputs). A modality whose tokens are all masked adds nothing; a sample all
        of whose modalities are gives -inf without gradient. A pooled vector shorter than 1e-8 counts as that long.

    Raises:
        ValueError, TypeError: shapes, dtypes, masks or devices that do not fit.

    Example:
        frames = Context(to_keys(frame_tokens), to_values(frame_tokens), frame_mask)
        scores = conditioned_similarity(texts, to_queries(texts), frames, audio)
    """
    _check(x, queries, contexts)
    width = queries.shape[1]
    temperature = width**0.5 if temperature is None else temperature
    check_positive(temperature=temperature)
    one = torch.cat([queries, x.to(torch.promote_types(x.dtype, queries.dtype))], 1).unsqueeze(1)
    tokens = torch.cat([torch.cat([each.keys, each.values], 2) for each in contexts], 1)
    mask = None
    if any(each.mask is not None for each in contexts):
        mask = torch.cat(
            [
                each.keys.new_ones(each.keys.shape[:2], dtype=torch.bool) if each.mask is None else each.mask
                for each in contexts
            ],
            1,
        )
    lengths = [each.keys.shape[1] for each in contexts]
    # What autograd keeps of the pooled vectors [n, m, D] counts in units of the weights [n, m, L].
    copies = 8 + 4 * -(-x.shape[1] // max(1, sum(lengths)))
    numbers = temperature, width, *lengths
    return pair_scores(
        "conditioned", one, tokens, None, mask, numbers=numbers, copies=copies, memory_budget=memory_budget
    )


def _check(x: Tensor, queries: Tensor, contexts: Sequence[Context]) -> None:
    for name, each in (("x", x), ("queries", queries)):
        if not isinstance(each, Tensor) or each.dim() != 2 or each.shape[0] != x.shape[0]:
            raise ValueError(f"{name} is {described(each)}: expected [N, features], one row for each text")
    if not contexts:
        raise ValueError("no context: expected at least one Context(keys, values, mask)")
    for number, (keys, values, mask) in enumerate(contexts):
        expected = [contexts[0].keys.shape[0], keys.shape[1]] if keys.dim() == 3 else ["M", "L"]
        for name, each, width in (("keys", keys, queries.shape[1]), ("values", values, x.shape[1])):
            if list(each.shape) != [*expected, width]:
                raise ValueError(f"{name} of context {number} are {described(each)}: expected {[*expected, width]}")
        if mask is not None:
            check_mask(mask, keys, f"context {number}")


@formula
def conditioned(block: Block, numbers: Sequence[float], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Numbers: the temperature, the width of queries and keys, the length of each modality."""
    temperature, width, lengths = numbers[0], int(numbers[1]), [int(each) for each in numbers[2:]]
    query, text = block.x[:, 0, :width], block.x[:, 0, width:]
    tokens, mask = block.y[0], block.y_mask
    similarity = torch.einsum("np,mlp->nml", query, tokens[..., :width]) / temperature
    weights = []
    for logits, allowed in zip(torch.split(similarity, lengths, 2), torch.split(mask, lengths, 2), strict=True):
        empty = ~allowed.any(2, keepdim=True)
        weights.append(logits.masked_fill(~(allowed | empty), -torch.inf).softmax(2).masked_fill(empty, 0))
    vectors = torch.einsum("nml,mld->nmd", torch.cat(weights, 2), tokens[..., width:])
    scores = F.cosine_similarity(text[:, None], vectors, dim=-1)
    return (scores.masked_fill(block.y_empty, -torch.inf),)
