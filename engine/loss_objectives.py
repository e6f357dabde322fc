"""Losses of ``pairtile.kernels`` as objectives: those that need the features, the scale and the ids of a batch alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels import (
    AlignmentUniformityLoss,
    CircleLoss,
    DebiasedContrastiveLoss,
    DecoupledContrastiveLoss,
    HardNegativeLoss,
    MatryoshkaLoss,
    MultiPositiveLoss,
    SDMLoss,
    SigLipPlusLoss,
    TripletLoss,
)
from .data import Batch
from .errors import RecipeError
from .model import DualOutput

#: Constructor arguments that the trainer decides: it wants the mean over the global batch.
_DECIDED = ("self", "group", "rank", "world_size", "local_loss", "reduction", "options")


def dtype_on_wire(name: str | None) -> torch.dtype | None:
    """A recipe's ``wire_dtype``, in which features travel between ranks: bfloat16, float16, or None for their own.

    Raises:
        ValueError: another name.
    """
    if name not in (None, "bfloat16", "float16"):
        raise ValueError(f"wire_dtype={name!r}: expected bfloat16, float16 or nothing")
    return None if name is None else getattr(torch, name)


@dataclass(frozen=True)
class LossObjective:
    """Makes objectives of a loss.

    Attributes:
        loss: its class; a recipe's ``args`` are those of the constructor.
        given: what its forward gets beside the features, by name: logit_scale, logit_bias, image_ids, text_ids.
    """

    loss: type[nn.Module]
    given: tuple[str, ...] = ()

    def __call__(self, *, group: dist.ProcessGroup | None, **arguments: Any) -> _OfFeatures:
        if "wire_dtype" in arguments:
            arguments |= {"wire_dtype": dtype_on_wire(arguments["wire_dtype"])}
        return _OfFeatures(self.loss(group=group, **arguments), self.given)

    def arguments(self) -> list[str]:
        """Names of the constructor's arguments, those that it passes on to its base classes among them."""
        constructors = [vars(each)["__init__"] for each in self.loss.__mro__ if "__init__" in vars(each)]
        ours = constructors[: constructors.index(nn.Module.__init__)]
        names = dict.fromkeys(name for each in ours for name in inspect.signature(each).parameters)
        return [name for name in names if name not in _DECIDED]


class _OfFeatures:
    def __init__(self, loss: nn.Module, given: tuple[str, ...]) -> None:
        self.loss, self.given = loss, given

    def __call__(self, output: DualOutput, batch: Batch) -> Tensor:
        if "logit_bias" in self.given and output.logit_bias is None:
            raise RecipeError(
                f"{type(self.loss).__name__} needs a bias: set model.init_logit_bias (SigLIP starts at -10)"
            )
        ids = batch.ids.to(output.image_features.device) if "image_ids" in self.given else None
        known = {"logit_scale": output.logit_scale, "logit_bias": output.logit_bias, "image_ids": ids, "text_ids": ids}
        loss: Tensor = self.loss(
            output.image_features, output.text_features, **{name: known[name] for name in self.given}
        )
        return loss


_SCALE, _IDS = ("logit_scale",), ("image_ids", "text_ids")
#: By the names that recipes use. The triplet loss takes cosines as they are: its margin is in their units.
LOSS_OBJECTIVES = {
    "alignment_uniformity": LossObjective(AlignmentUniformityLoss, _SCALE),
    "circle": LossObjective(CircleLoss, _IDS),
    "debiased": LossObjective(DebiasedContrastiveLoss, _SCALE),
    "decoupled": LossObjective(DecoupledContrastiveLoss, _SCALE),
    "hard_negative": LossObjective(HardNegativeLoss, _SCALE),
    "matryoshka": LossObjective(MatryoshkaLoss, _SCALE),
    "multi_positive": LossObjective(MultiPositiveLoss, (*_SCALE, *_IDS)),
    "sdm": LossObjective(SDMLoss, (*_SCALE, *_IDS)),
    "siglip_plus": LossObjective(SigLipPlusLoss, (*_SCALE, "logit_bias", *_IDS)),
    "triplet": LossObjective(TripletLoss),
}
