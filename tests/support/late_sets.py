"""Ragged sets of tokens with an empty one, and a function's values beside its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sets(seed: int, *shape: int, width: int = 6) -> tuple[Tensor, Tensor]:
    """Unit tokens and a mask with holes; the second set is empty, the third has one token, all others two at least."""
    generator = torch.Generator().manual_seed(seed)
    tokens = F.normalize(torch.randn(*shape, width, generator=generator, dtype=torch.float64), dim=-1)
    mask = torch.rand(shape, generator=generator) > 0.3
    mask[..., :2] = True
    mask[1] = False
    mask[2] = torch.arange(shape[-1]) == 1
    tokens[~mask] = torch.nan  # what masked tokens hold has no effect
    return tokens, mask


def differentiated(function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The values, and the gradients of a weighted sum of the finite ones."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    values = function(*leaves)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    finite = values.isfinite()
    (values[finite] * weights[finite].to(values)).sum().backward()
    return values.detach(), *(leaf.grad for leaf in leaves)
