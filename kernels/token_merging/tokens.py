"""The tokens between two layers of a patched model, with what is known of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .frames import join_frames

#: The size of a padding token: no average with a real token sees it, and one of padding alone is finite.
PADDING = 2.0**-64


class Tokens(NamedTuple):
    """What patched layers hand to one another in place of a tensor.

    Sizes travel with the tokens, not beside them, so that any number of forward passes may be under way, and a
    checkpointed layer that is computed once more gets what it was given.

    Attributes:
        x: [B, S, C].
        size: float32 [B, S, 1], how many tokens each stands for, PADDING for padding; None: one each.
        origin: int64 [B, S], the position that each had at first; None where nobody asks for it.
        place: int64 [B, N], where each of the first tokens is; None where nobody asks for it.
        first: N, how many they were at first, in each frame.
        padded: some may be padding.
        merged: they are not the first ones.
    """

    x: Tensor
    size: Tensor | None
    origin: Tensor | None
    place: Tensor | None
    first: int
    padded: bool
    merged: bool = False

    def real(self) -> Tensor:
        """bool [B, S, 1]: what is not padding alone."""
        return torch.ones_like(self.x[..., :1], dtype=torch.bool) if self.size is None else self.size >= 0.5

    def attention_size(self, proportional: bool) -> Tensor | None:
        """[B, S, 1], what `AttentionTo` is to count, 0 for padding; None where attention can run as it is."""
        if not self.merged or not (proportional or self.padded):
            return None
        if not proportional:
            return self.real().to(torch.float32)
        return self.size.where(self.real(), 0.0) if self.padded and self.size is not None else self.size

    def joined(self, group: int, prefix: int) -> Tokens:
        """Clips of `group` neighbours: their first `prefix` tokens averaged, the others as `join_frames` has them.

        A clip's `place` is [B / group, group N]: that of every first token of its frames, one frame after another.
        """

        def fold(each: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
            both = join_frames(each, group, prefix=prefix)
            front, others = both[:, : group * prefix], both[:, group * prefix :]
            return torch.cat([reduce(front.view(len(both), group, prefix, both.shape[-1])), others], 1)

        size = torch.ones_like(self.x[..., :1], dtype=torch.float32) if self.size is None else self.size
        origin, place = self.origin, self.place
        if origin is not None:
            origin = fold(origin.unsqueeze(-1), lambda front: front[:, 0]).squeeze(-1)
        if place is not None:
            place = place.view(-1, group, place.shape[1])
            frame = torch.arange(group, device=place.device)[:, None]
            place = torch.where(place < prefix, place, prefix + (place - prefix) * group + frame).flatten(1, 2)
        return self._replace(
            x=fold(self.x, lambda front: front.mean(1)),
            size=fold(size, lambda front: front.sum(1)),
            origin=origin,
            place=place,
            merged=True,
        )
