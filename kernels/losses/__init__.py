"""Losses, one file each; every one is a few lines over the sums and reductions of `contrastive/`."""

from .alignment_uniformity import AlignmentUniformityLoss
from .cacr import CACRLoss
from .clip import ClipLoss
from .coca import CoCaLoss
from .colbert import ColbertLoss
from .cwcl import CWCLLoss
from .debiased import DebiasedContrastiveLoss
from .decoupled import DecoupledContrastiveLoss
from .distill import DistillClipLoss
from .filip import FilipLoss
from .hard_negative import HardNegativeLoss
from .late_distill import LateDistillationLoss
from .linear_cross_entropy import linear_cross_entropy
from .matryoshka import MatryoshkaLoss
from .mod_x import ModXLoss
from .momentum import MomentumDistillationLoss
from .multi_positive import CircleLoss, MultiPositiveLoss
from .over_scores import over_scores
from .sdm import SDMLoss
from .siglip import SigLipLoss
from .siglip_plus import SigLipPlusLoss
from .soft_target import SoftClipLoss, SoftTargetLoss
from .triplet import TripletLoss
from .vicinity_mix import VicinityMixLoss, vicinity_mix

__all__ = [
    "AlignmentUniformityLoss",
    "CACRLoss",
    "CWCLLoss",
    "CircleLoss",
    "ClipLoss",
    "CoCaLoss",
    "ColbertLoss",
    "DebiasedContrastiveLoss",
    "DecoupledContrastiveLoss",
    "DistillClipLoss",
    "FilipLoss",
    "HardNegativeLoss",
    "LateDistillationLoss",
    "MatryoshkaLoss",
    "ModXLoss",
    "MomentumDistillationLoss",
    "MultiPositiveLoss",
    "SDMLoss",
    "SigLipLoss",
    "SigLipPlusLoss",
    "SoftClipLoss",
    "SoftTargetLoss",
    "TripletLoss",
    "VicinityMixLoss",
    "linear_cross_entropy",
    "over_scores",
    "vicinity_mix",
]
