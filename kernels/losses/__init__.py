"""Losses, one file each; every one is a few lines over the sums and reductions of `contrastive/`."""

from .clip import ClipLoss
from .coca import CoCaLoss
from .debiased import DebiasedContrastiveLoss
from .decoupled import DecoupledContrastiveLoss
from .hard_negative import HardNegativeLoss
from .linear_cross_entropy import linear_cross_entropy
from .multi_positive import CircleLoss, MultiPositiveLoss
from .siglip import SigLipLoss
from .siglip_plus import SigLipPlusLoss
from .triplet import TripletLoss

__all__ = [
    "CircleLoss",
    "ClipLoss",
    "CoCaLoss",
    "DebiasedContrastiveLoss",
    "DecoupledContrastiveLoss",
    "HardNegativeLoss",
    "MultiPositiveLoss",
    "SigLipLoss",
    "SigLipPlusLoss",
    "TripletLoss",
    "linear_cross_entropy",
]
