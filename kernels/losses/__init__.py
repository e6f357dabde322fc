"""Losses, one file each; every one is a few lines over the reductions of `similarity_reduce`."""

from .clip import ClipLoss
from .siglip import SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss"]
