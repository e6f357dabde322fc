"""`project_max` on the `triton` backend: the maximum of sets that are single rows of the weight."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends import Request
from .pooling import MaxPooling
from .token_sets import TokenSets

if TYPE_CHECKING:
    from .project_max import Projection


def _columns(weight: Tensor) -> TokenSets:
    """Each column of the projection, a row of the weight, as a set of its own."""
    starts = torch.arange(weight.shape[0], device=weight.device)
    return TokenSets(weight, starts, torch.ones_like(starts), None, 1, 1)
