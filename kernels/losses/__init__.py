"""Losses, one file each; every one is a few lines over the sums and reductions of `contrastive/`."""

from .alignment_uniformity import AlignmentUniformityLoss
from .cacr import CACRLoss
from .clip import ClipLoss
from .coca import CoCaLoss
from .cwcl import CWCLLoss
from .distill import DistillClipLoss
from .linear_cross_entropy import linear_cross_entropy
from .matryoshka import MatryoshkaLoss
from .mod_x import ModXLoss
from .momentum import MomentumDistillationLoss
from .sdm import SDMLoss
from .siglip import SigLipLoss
from .soft_target import SoftClipLoss, SoftTargetLoss
from .vicinity_mix import VicinityMixLoss, vicinity_mix

__all__ = [
    "AlignmentUniformityLoss",
    "CACRLoss",
    "CWCLLoss",
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "MatryoshkaLoss",
    "ModXLoss",
    "MomentumDistillationLoss",
    "SDMLoss",
    "SigLipLoss",
    "SoftClipLoss",
    "SoftTargetLoss",
    "VicinityMixLoss",
    "linear_cross_entropy",
    "vicinity_mix",
]
