"""The loss of FILIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed import Exchange, gather_counts
from ..late_interaction import filip_similarity, maxsim, most_similar_tokens
from .base import check_scalar
from .clip import checked_weights
from .ring_scores import ring_scores
from .score_terms import Sets, TokenLoss, check_token_pairs, col_terms, counted_pairs, row_terms


class FilipLoss(TokenLoss):
    """Cross-entropy of token-wise maximum similarities, each direction over its own matrix (FILIP, arXiv:2111.07783).

    With s_I(i, j) = mean_{p in image i} max_{r in text j} <p, r> and s_T(i, j) = mean_{r in text j} max_{p in image i} <p, r>,

        w_it * -log softmax_j(scale s_I(i, .))[i] + w_ti * -log softmax_j(scale s_T(., i))[i],

    and the loss is the mean over the batch. Each cross-entropy is computed as in `ClipLoss`, without cancellation. Neither
    the tensor of all token products nor its gradient is stored; the two [batch, batch] matrices are.

    A pair whose image or text has no token that counts takes no part, neither as a term nor as another's negative: the
    loss is that of the batch without it, and `dropped_pairs` counts such pairs. If all are dropped the mean is NaN, as
    `F.cross_entropy`'s is when every target is ignored.

    On several ranks each passes its own pairs, as in `ClipLoss`. Texts' tokens travel, padded to the longest rank's, and one
    vector for each rank of what its images make of every text; the gradient is exact.

    Args:
        direction_weights: (w_it, w_ti). A direction of weight 0 is not computed.
        travelling: "text" or "image", the side whose tokens every rank holds; texts have fewer.
        select_tokens: the share of each set's tokens, above 0 and below 1, that takes part: those with the highest
            token-wise maximum similarity with the rank's own batch (section 3.1 of the paper has 0.25), chosen without
            gradient before anything travels. None: all. The choice, and so the loss, depends on how the batch lies over
            the ranks.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`; reduction="none" gives 0 for
            dropped pairs.

    Raises:
        ValueError: values out of their range, or options as in `ClipLoss`.
    """

    def __init__(
        self,
        *,
        direction_weights: tuple[float, float] = (0.5, 0.5),
        travelling: str = "text",
        select_tokens: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.direction_weights = checked_weights(direction_weights)
        if travelling not in ("text", "image"):
            raise ValueError(f'travelling={travelling!r}: expected "text" or "image"')
        if select_tokens is not None and not 0 < select_tokens < 1:
            raise ValueError(f"select_tokens={select_tokens!r}: expected a share above 0 and below 1, or None for all")
        self.travelling = travelling
        self.select_tokens = select_tokens

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        logit_scale: float | Tensor,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_tokens: [batch, Li, D], unit vectors where similarities are to be cosines; any floating dtype.
            text_tokens: [batch, Lt, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            image_mask, text_mask: bool [batch, Li] and [batch, Lt], True for tokens that count; None: all.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 tokens); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes, dtypes, masks or devices that do not fit.
        """
        images, texts = Sets(image_tokens, image_mask), Sets(text_tokens, text_mask)
        check_token_pairs(images, texts, ("image_tokens", "text_tokens"))
        check_scalar("logit_scale", logit_scale)
        if self.select_tokens is not None:
            images, texts = _with_each_other(images, texts)
            images, texts = _selected(images, texts, self.select_tokens), _selected(texts, images, self.select_tokens)
        rows, cols, weights = images, texts, self.direction_weights
        if self.travelling == "image":
            rows, cols, weights = texts, images, weights[::-1]
        exchange = self._exchange()
        if exchange is not None and exchange.strategy == "ring":
            shards = gather_counts(len(rows.tokens), device=rows.tokens.device, group=exchange.group)
            pairs = counted_pairs(rows, cols, shards, shards.start, travelling=True)
            of_rows, of_cols = _in_ring(rows, cols, weights, exchange)
        else:
            shards, cols = cols.gathered(exchange)
            pairs = counted_pairs(rows, cols, shards, shards.start)
            of_rows, of_cols = _similarities(rows, cols, weights)
        terms: list[Tensor] = []
        if of_rows is not None:
            terms.append(weights[0] * row_terms(pairs.scaled(of_rows, logit_scale), pairs))
        if of_cols is not None:
            terms.append(weights[1] * col_terms(pairs.scaled(of_cols, logit_scale), pairs))
        loss = self._reduced(torch.stack(terms).sum(0), pairs)
        return {"contrastive_loss": loss} if output_dict else loss


def _with_each_other(images: Sets, texts: Sets) -> tuple[Sets, Sets]:
    """Without the tokens of pairs that do not count, so that none of them has a say in what is selected."""
    counts = [
        torch.full(each.tokens.shape[:2], True, device=each.tokens.device) if each.mask is None else each.mask
        for each in (images, texts)
    ]
    both = (counts[0].any(1) & counts[1].any(1)).unsqueeze(1)
    return Sets(images.tokens, counts[0] & both), Sets(texts.tokens, counts[1] & both)


def _selected(sets: Sets, others: Sets, share: float) -> Sets:
    return Sets(*most_similar_tokens(sets.tokens, others.tokens, share, sets.mask, others.mask))


def _in_ring(x: Sets, y: Sets, weights: tuple[float, float], exchange: Exchange) -> tuple[Tensor | None, Tensor | None]:
    def scores(rows: Sets, cols: Sets) -> list[Tensor]:
        return [each for each in _similarities(rows, cols, weights) if each is not None]

    found = iter(ring_scores(scores, x, y, exchange))
    of_rows, of_cols = (next(found) if weight else None for weight in weights)
    return of_rows, of_cols


def _similarities(x: Sets, y: Sets, weights: tuple[float, float]) -> tuple[Tensor | None, Tensor | None]:
    """FILIP's two matrices [n, N]; None for a direction of weight 0."""
    if all(weights):
        return filip_similarity(x.tokens, y.tokens, x.mask, y.mask)
    if weights[0]:
        return maxsim(x.tokens, y.tokens, x.mask, y.mask, aggregate="mean"), None
    return None, maxsim(y.tokens, x.tokens, y.mask, x.mask, aggregate="mean").T
