"""Tokens of a video: merged within frames and across neighbours (TempMe, arXiv:2409.01156), pooled in windows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..contrastive.arguments import described
from .checks import check_number
from .matching import Matching
from .merging import merge_tokens
from .tome import bipartite_matching


def merge_frames(
    x: Tensor,
    metric: Tensor,
    r: int,
    size: Tensor | None = None,
    *,
    group: int = 1,
    prefix: int = 0,
    match: Callable[..., Matching] = bipartite_matching,
) -> tuple[Tensor, Tensor]:
    """TempMe's two scopes: tokens merged within each frame, or across `group` neighbours, which become one clip.

    A clip is a longer frame: it can be merged within (`group=1`) or with its neighbours again. Its tokens are those of
    `join_frames`, in the order that the matching leaves them.

    Args:
        x: [B F, N, C], the frames of a video one after another; differentiable.
        metric: [B F, N, K], what similarity is taken of; no gradient.
        r: tokens to take away from each frame or clip; at most half of those without prefix. To keep less, merge again.
        size: [B F, N, 1], or None where each token stands for itself.
        group: how many neighbouring frames, or clips, are joined.
        prefix: so many first tokens of each frame (class tokens, registers) are never merged. A clip has all of its
            frames'.
        match: (metric, r, *, protected) -> Matching: `bipartite_matching`, `complete_graph_matching`, or a partial
            `pitome_matching` with its margin.

    Returns:
        (tokens [B F / group, group N - r, C], sizes [B F / group, group N - r, 1]).

    Raises:
        ValueError: a number of frames that `group` does not divide, or shapes that do not fit.
    """
    if not isinstance(metric, Tensor) or metric.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"metric is {described(metric)}: expected {list(x.shape[:2])} and channels, one for each token"
        )
    joined = join_frames(metric, group, prefix=prefix)
    matching = match(joined, r, protected=group * prefix)
    sizes = None if size is None else join_frames(size, group, prefix=prefix)
    return merge_tokens(join_frames(x, group, prefix=prefix), matching, sizes)


def join_frames(x: Tensor, group: int, *, prefix: int = 0) -> Tensor:
    """[B F, N, C] -> [B F / group, group N, C]: first the prefix tokens of the joined frames, then all others.

    The others go place by place, and at each place frame by frame: what stands still then lies side by side, on the two
    sides of a bipartite matching. Frame after frame, an even number of tokens would put both on one side.

    Raises:
        ValueError: a number of frames that `group` does not divide, or another shape.
    """
    check_number("group", group, least=1)
    check_number("prefix", prefix)
    if x.dim() != 3 or x.shape[0] % group or prefix > x.shape[1]:
        raise ValueError(
            f"x is {described(x)}: expected [frames, tokens, channels], frames a multiple of group={group}, tokens at "
            f"least prefix={prefix}"
        )
    if group == 1:
        return x
    frames, tokens, width = x.shape
    clips = x.reshape(frames // group, group, tokens, width)
    front, others = clips[:, :, :prefix], clips[:, :, prefix:].transpose(1, 2)
    return torch.cat([front.flatten(1, 2), others.flatten(1, 2)], 1)


def pool_windows(x: Tensor, window: tuple[int, int, int]) -> Tensor:
    """Means over windows of a video's tokens: [B, T, H, W, C] -> [B, T / t, H / h, W / w, C], differentiable.

    (t, 1, 1) reduces time and (1, h, w) space: the two streams of LLaVA-ST's packer (arXiv:2501.08282), whose tokens
    then attend to their windows.

    Raises:
        ValueError: sizes that are no multiples of the window's.
    """
    sizes = x.shape[1:4]
    if x.dim() != 5 or len(window) != 3 or any(each < 1 or size % each for size, each in zip(sizes, window)):
        raise ValueError(f"x is {described(x)}: expected [batch, T, H, W, channels], multiples of the window {window}")
    t, h, w = (size // each for size, each in zip(sizes, window))
    return x.reshape(x.shape[0], t, window[0], h, window[1], w, window[2], x.shape[-1]).mean((2, 4, 6))
