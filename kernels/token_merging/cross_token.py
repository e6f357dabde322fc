"""CrossGET's guide: a token in each layer that learns what matters to the other modality (arXiv:2305.17455)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contrastive.arguments import described


class CrossTokens(nn.Module):
    """The cross token of each layer of a tower: its first token, without gradient, plus a learned vector.

    It stands behind the others, takes part in the layer's attention, is never merged, and is left out of what the tower
    returns. The importance of a token is its cosine with the cross token, taken of their keys (the authors' code compares
    with the cross token's query). `cross_token_divergence` brings those of two modalities together.

    Args:
        layers: of the tower.
        width: C, channels of a token.

    Attributes:
        weight: [layers, C], at first 0.
        found: of the last forward pass, [B, C] of each layer, differentiable.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.weight = nn.Parameter(torch.zeros(layers, width))
        self.found: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # what is found belongs to a graph, which can be neither copied nor pickled
        return {**self.__dict__, "found": {}}

    def forward(self, x: Tensor, layer: int) -> Tensor:
        """x [B, N, C] that enter a layer, without a cross token -> [B, N + 1, C]."""
        token = x[:, 0].detach() + self.weight[layer].to(x.dtype)
        self.found[layer] = token
        return torch.cat([x, token.unsqueeze(1)], 1)

    def tokens(self) -> Tensor:
        """Of the last forward pass, the cross tokens of all layers: [layers, B, C], differentiable.

        Raises:
            RuntimeError: there was none.
        """
        if len(self.found) != self.layers:
            raise RuntimeError("cross tokens are found in a forward pass of the tower that they are patched into")
        return torch.stack([self.found[layer] for layer in range(self.layers)])


def cross_guide(keys: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """(importance [B, N], mask bool [N] of what is never merged) of keys [B, N, K] whose last is the cross token's."""
    unit = F.normalize(keys, dim=-1)
    importance = (unit @ unit[:, -1].unsqueeze(-1)).squeeze(-1)
    barred = torch.arange(keys.shape[1], device=keys.device) < protected
    barred[-1] = True
    return importance, barred


def cross_token_divergence(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the cross tokens of two modalities, which CrossGET adds to the loss.

    JS(p, q) = (KL(p | m) + KL(q | m)) / 2 with p and q the softmax over channels and m = (p + q) / 2, in nats. (The
    authors' code has KL(m | p) and KL(m | q).)

    Args:
        one: [..., D] in the space of the embeddings, differentiable.
        other: of the same shape.

    Returns:
        [...], float32 at least.

    Raises:
        ValueError: shapes that differ.
    """
    if one.shape != other.shape:
        raise ValueError(f"cross tokens are {described(one)} and {described(other)}: expected one shape")
    wide = torch.promote_types(one.dtype, torch.float32)
    log_p, log_q = (each.to(wide).log_softmax(-1) for each in (one, other))
    log_m = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
    of_p, of_q = (F.kl_div(log_m, each, reduction="none", log_target=True).sum(-1) for each in (log_p, log_q))
    return (of_p + of_q) / 2
