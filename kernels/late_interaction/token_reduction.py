"""A learned layer that makes few tokens of many before late interaction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contrastive.arguments import described
from .token_sets import check_mask


class TokenReduction(nn.Module):
    """K tokens from L, each a learned attention over all of them (Wukong, arXiv:2202.06767; TokenLearner, arXiv:2106.11297).

        a_k = softmax_l(W_k G norm(token_l)),   out_k = sum_l a_kl (H token_l)

    G and H are linear maps in groups of features, as in the authors' code, whose 1 x 1 convolutions these are. Patches then
    cost late interaction K instead of L products for each word. Without a normalisation at the end: normalise the tokens as
    the model does.

    Args:
        features: D of the tokens.
        tokens: K.
        groups: of features in G and H; divides D.
    """

    def __init__(self, features: int, tokens: int, groups: int = 8) -> None:
        super().__init__()
        if tokens < 1 or groups < 1 or features % groups:
            raise ValueError(
                f"TokenReduction(features={features}, tokens={tokens}, groups={groups}): expected at least one token, and "
                "groups that divide the features"
            )
        self.norm = nn.LayerNorm(features)
        self.grouped = nn.Conv1d(features, features, 1, groups=groups)
        self.attention = nn.Conv1d(features, tokens, 1)
        self.values = nn.Conv1d(features, features, 1, groups=groups)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reduced tokens [B, K, D].

        Args:
            tokens: [B, L, D].
            mask: bool [B, L], True for tokens that count; None: all. A sample without any gives zeros.

        Raises:
            ValueError: shapes that do not fit.
        """
        width = self.norm.normalized_shape[0]
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or tokens.shape[2] != width:
            raise ValueError(f"tokens is {described(tokens)}: expected [batch, tokens, {width}]")
        if mask is not None:
            check_mask(mask, tokens, "tokens")
            tokens = tokens.masked_fill(~mask[:, :, None], 0)
        logits = self.attention(self.grouped(self.norm(tokens).transpose(1, 2)))  # [B, K, L]
        values = self.values(tokens.transpose(1, 2)).transpose(1, 2)
        if mask is None:
            return torch.matmul(logits.softmax(2), values)
        empty = ~mask.any(1)[:, None, None]
        weights = logits.masked_fill(~(mask[:, None] | empty), -torch.inf).softmax(2)
        return torch.matmul(weights.masked_fill(empty, 0), values)
