"""What all contrastive losses share: options, checks, and the exchange between ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..contrastive.operator import FEATURE_DTYPES
from ..distributed import Shards, find_group, gather_shards, global_mean

_REDUCTIONS = ("mean", "sum", "none")


class ContrastiveLoss(nn.Module):
    """Options common to the losses, and the two steps before and after their formula."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        local_loss: bool,
        group: dist.ProcessGroup | None,
        strategy: str,
        reduction: str,
    ) -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(_REDUCTIONS)}")
        if strategy != "gather":
            raise ValueError(f'strategy={strategy!r}: this version has strategy="gather" only')
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}: expected 0 <= rank < world_size")
        self.rank = rank
        self.world_size = world_size
        self.local_loss = local_loss
        self.group = group
        self.strategy = strategy
        self.reduction = reduction

    def _shards(self, image_features: Tensor, text_features: Tensor, *travelling: Tensor) -> Shards:
        """Check the batch and agree with the other ranks on how `travelling`, the gathered tensors, lie."""
        for name, features in (("image_features", image_features), ("text_features", text_features)):
            if not isinstance(features, Tensor) or features.dtype not in FEATURE_DTYPES:
                given = features.dtype if isinstance(features, Tensor) else type(features).__name__
                raise TypeError(f"{name} is {given}: expected a float16, bfloat16, float32 or float64 tensor")
            if features.dim() != 2:
                raise ValueError(f"{name} has shape {list(features.shape)}: expected [batch, features]")
        if image_features.shape != text_features.shape:
            raise ValueError(
                f"image_features {list(image_features.shape)} and text_features {list(text_features.shape)} "
                "differ: row i of both must embed the same pair, in one space"
            )
        group = find_group(self.group, self.world_size, self.rank)
        return gather_shards(*travelling, group=group)

    def _finish(self, terms: Tensor, shards: Shards, output_dict: bool) -> Tensor | dict[str, Tensor]:
        loss = global_mean(terms, shards, reduction=self.reduction, local=self.local_loss)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return f"world_size={self.world_size}, local_loss={self.local_loss}, reduction={self.reduction!r}"
