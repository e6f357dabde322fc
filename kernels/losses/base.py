"""What all contrastive losses share: options, checks, and the exchange between ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..contrastive.arguments import FEATURE_DTYPES, described
from ..distributed import Exchange, Shards, find_group, global_mean, node_group
from ..distributed.exchange import check_exchange
from ..distributed.shards import all_numbers

#: Whose columns are a row's negatives: all ranks', those of its node, or those of a group that this process is in.
Scope = str | dist.ProcessGroup

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}")


class ContrastiveLoss(nn.Module):
    """Options common to the losses, and the two steps before and after their formula.

    Args:
        rank, world_size: this process, and how many there are; above 1 the batch is spread over the default process group.
        local_loss: return this rank's share L_r, whose mean over ranks is the loss; the gradient is the same.
        group: process group to use instead of the default one; rank and world_size may then be left out.
        strategy, wire_dtype, node_size: as in `pairtile.kernels.distributed.Exchange`.
        reduction: "mean", "sum" (both over the whole batch), or "none": the terms of this rank's owners.
        scope: "global"; "node": the loss of each node's own batch, of `node_size` ranks, or LOCAL_WORLD_SIZE if that is
            None; or a process group. The mean over all ranks is then the mean of the groups' losses, each weighted by its
            ranks.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        local_loss: bool = False,
        group: dist.ProcessGroup | None = None,
        strategy: str = "gather",
        reduction: str = "mean",
        scope: Scope = "global",
        wire_dtype: torch.dtype | None = None,
        node_size: int | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_exchange(strategy, wire_dtype, node_size)
        if scope not in ("global", "node") and not isinstance(scope, dist.ProcessGroup):
            raise ValueError(f'scope={scope!r}: expected "global", "node" or a process group')
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}: expected 0 <= rank < world_size")
        self.rank = rank
        self.world_size = world_size
        self.local_loss = local_loss
        self.group = group
        self.strategy = strategy
        self.reduction = reduction
        self.scope = scope
        self.wire_dtype = wire_dtype
        self.node_size = node_size
        # By name, which is the same on all ranks, also where a group is made anew.
        self._agreed_in = ""

    def _group(self) -> dist.ProcessGroup | None:
        """The group that this call runs over; None for one process."""
        whole = find_group(self.group, self.world_size, self.rank)
        if whole is not None:
            self._agree(whole)
        if isinstance(self.scope, dist.ProcessGroup):
            return find_group(self.scope, 1, 0)
        if whole is None or self.scope == "global":
            return whole
        return find_group(node_group(self.node_size), 1, 0)

    def _agree(self, group: dist.ProcessGroup) -> None:
        """Raise, at the first call, unless the loss has the same options on all ranks: with others they would hang."""
        if torch.compiler.is_compiling() or self._agreed_in == group.group_name:
            return
        plain = (bool, int, float, str, tuple, torch.dtype)
        options = {
            name: value
            for name, value in sorted(vars(self).items())
            if isinstance(value, plain) and name not in ("rank", "training", "_agreed_in")
        }
        said = f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in options.items())})"
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        all_numbers([], group, device, said)
        self._agreed_in = group.group_name

    def _exchange(self) -> Exchange | None:
        """The same, with how its ranks share their features."""
        group = self._group()
        # What is inside a node has no second level.
        node_size = self.node_size if self.scope == "global" else None
        return None if group is None else Exchange(group, self.strategy, self.wire_dtype, node_size)

    def _weights(self, shards: Shards) -> tuple[float, float]:
        """What the operator multiplies its sum with, and what its result is multiplied with: `shards.weight` together.

        Inside the operator the weight costs nothing. But torch.compile takes a number there as a constant, so that
        every batch size would be compiled anew: traced, it stays outside.
        """
        weight = shards.weight(self.reduction)
        return (1.0, weight) if torch.compiler.is_compiling() else (weight, 1.0)

    def _finish(self, terms: Tensor, shards: Shards) -> Tensor:
        """The loss from this rank's terms, or from their sum times `shards.weight(self.reduction)`."""
        return global_mean(terms, shards, reduction=self.reduction, local=self.local_loss)

    def extra_repr(self) -> str:
        return f"world_size={self.world_size}, local_loss={self.local_loss}, reduction={self.reduction!r}"


def check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    """Raise unless row i of both can embed the same pair."""
    check_matrix("image_features", image_features)
    check_matrix("text_features", text_features)
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"image_features {list(image_features.shape)} and text_features {list(text_features.shape)} "
            "differ: row i of both must embed the same pair, in one space"
        )


def check_scalar(name: str, value: object) -> None:
    """Raise if a tensor has more than one entry: the operators take one for each row, the losses do not."""
    if isinstance(value, Tensor) and value.shape not in ((), (1,)):
        raise ValueError(f"{name} is {described(value)}: expected a number, or a tensor of shape [] or [1]")


def check_matrix(name: str, features: Tensor, width: int | None = None) -> None:
    """Raise unless `features` is a floating point matrix (with rows of that width)."""
    if not isinstance(features, Tensor) or features.dtype not in FEATURE_DTYPES:
        given = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{name} is {given}: expected a float16, bfloat16, float32 or float64 tensor")
    if features.dim() != 2 or (width is not None and features.shape[1] != width):
        expected = "[batch, features]" if width is None else f"[any, {width}], the width of the batch"
        raise ValueError(f"{name} has shape {list(features.shape)}: expected {expected}")
