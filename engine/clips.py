"""Clips in an image tower: its frames are images of one batch, told apart by a learned position in time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import PairtileError


class FramePositions(nn.Module):
    """A learned vector for each frame of a clip, added to all of its patches.

    Without it a mean over frames could not tell a movement from its reverse. It works as a forward hook of a tower's
    patch embedding, so that the tower's own code and names stay as they are.
    """

    def __init__(self, frames: int, width: int) -> None:
        super().__init__()
        self.frames = frames
        self.weight = nn.Parameter(torch.empty(frames, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, patch_embedding: nn.Module, args: object, patches: Tensor) -> Tensor:
        """patches [n T, ..., width], the T frames of a clip one after another -> the same with their positions."""
        weight = self.weight.view(self.frames, *[1] * (patches.dim() - 2), -1)
        return (patches.unflatten(0, (-1, self.frames)) + weight).flatten(0, 1)


def add_frame_positions(tower: nn.Module, frames: int | None) -> FramePositions | None:
    """Positions for the frames that a tower takes; None for single images, or for a tower without a patch embedding."""
    embedding, width = getattr(tower, "patch_embed", None), getattr(tower, "embed_dim", None)
    if frames is None or not isinstance(embedding, nn.Module) or not isinstance(width, int):
        return None
    positions = FramePositions(frames, width)
    embedding.register_forward_hook(positions)
    return positions


def check_clips(images: Tensor, frames: int | None) -> None:
    """Raise :class:`PairtileError` unless these are images [n, C, H, W], or clips [n, frames, C, H, W] where frames is given."""
    expected = 4 if frames is None else 5
    if images.dim() != expected or (frames is not None and images.shape[1] != frames):
        wanted = (
            "images [n, channels, height, width]" if frames is None else f"clips [n, {frames}, channels, height, width]"
        )
        raise PairtileError(f"the image tower got {list(images.shape)}: expected {wanted}, as data.frames says")


def mean_over_clip(features: Tensor, clips: int) -> Tensor:
    """Of features [clips k, D], k rows for each clip, the mean of each clip's: [clips, D]."""
    return features if len(features) == clips else features.unflatten(0, (clips, -1)).mean(1)


def tokens_of_clip(tokens: Tensor, clips: int) -> Tensor:
    """[clips k, L, D] -> [clips, k L, D]: the tokens of all rows of a clip."""
    return tokens if len(tokens) == clips else tokens.unflatten(0, (clips, -1)).flatten(1, 2)
