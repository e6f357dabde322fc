"""TempMe inside a model: its layers merge within frames first, then across neighbours that become clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from .schedules import Schedule, merge_limit


class LayerPlan(NamedTuple):
    """What one layer does.

    Attributes:
        r: tokens to take away from each frame or clip between attention and MLP.
        join: so many neighbouring frames, or clips, become one before attention; 1: none.
        across: tokens to take away from each clip when it has been joined.
    """

    r: int
    join: int = 1
    across: int = 0


@dataclass(frozen=True)
class ClipMerging:
    """Which layers join neighbouring frames, and what they keep (TempMe, arXiv:2409.01156).

    Layers before the first of `join` see single frames and merge by the schedule of `patch`. A layer of `join` makes one
    clip of neighbouring frames, or clips, and merges across them by the similarity of the tokens that enter it; its
    attention then runs over the clip. It and all later layers also merge within the clip, as every layer does, between
    attention and MLP. The class tokens and registers of a clip are the means of its frames'.

    Attributes:
        frames: of one video; its frames come one after another in the batch.
        join: {layer from 0: how many neighbours become one}; the product divides `frames`.
        keep_across: share of a joined clip's tokens, the protected ones aside, that is kept, from 0.5 to 1.
        keep_within: share that is kept after attention, from the first layer of `join` on, from 0.5 to 1.

    Raises:
        ValueError: neighbours that do not divide the frames, or shares outside 0.5 to 1.
    """

    frames: int
    join: Mapping[int, int]
    keep_across: float = 0.7
    keep_within: float = 0.9

    def __post_init__(self) -> None:
        joined = prod(self.join.values())
        if not self.join or min(self.join) < 0 or min(self.join.values()) < 1 or self.frames < 1:
            raise ValueError(
                f"join={dict(self.join)!r} of {self.frames} frames: expected {{layer from 0: how many neighbours}}"
            )
        if self.frames % joined:
            raise ValueError(
                f"{self.frames} frames cannot be joined {' x '.join(map(str, self.join.values()))} at a time: expected "
                f"numbers whose product, here {joined}, divides them"
            )
        for name in ("keep_across", "keep_within"):
            share = getattr(self, name)
            if not 0.5 <= share <= 1:
                raise ValueError(f"{name}={share!r}: expected a share from 0.5 to 1, as one merge takes at most half")

    def plan(self, schedule: Schedule, layers: int, tokens: int, protected: int) -> list[LayerPlan]:
        """What each layer does.

        Args:
            schedule: of the layers before the first join.
            layers: of the model.
            tokens: of one frame that enter the first layer.
            protected: of these, how many are never merged.

        Raises:
            ValueError: a join before a layer that the model does not have.
        """
        if max(self.join) >= layers:
            raise ValueError(f"join={dict(self.join)!r}: the model's layers are 0 to {layers - 1}")
        first = min(self.join)
        plans = [LayerPlan(r) for r in schedule(layers, tokens, protected)[:first]]
        free = tokens - protected - sum(plan.r for plan in plans)
        for layer in range(first, layers):
            group = self.join.get(layer, 1)
            free *= group
            across = _taken(free, self.keep_across) if group > 1 else 0
            r = _taken(free - across, self.keep_within)
            plans.append(LayerPlan(r, group, across))
            free -= across + r
        return plans


def _taken(free: int, keep: float) -> int:
    return min(round((1 - keep) * free), merge_limit(free))
