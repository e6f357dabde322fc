"""Losses, one file each; every one is a few lines over the sums and reductions of `contrastive/`."""

from .clip import ClipLoss
from .coca import CoCaLoss
from .linear_cross_entropy import linear_cross_entropy
from .siglip import SigLipLoss

__all__ = ["ClipLoss", "CoCaLoss", "SigLipLoss", "linear_cross_entropy"]
