"""The launches of a maximum: which side is held, and the kernel's arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contrastive.triton_kernels import launching
from ..contrastive.triton_kernels.configurations import Config
from ..contrastive.triton_kernels.launching import cdiv
from .backends import Request, empty_kept
from .token_sets import TokenSets
from .triton_configurations import held_rows, max_config, next_power, whole_width
from .triton_kernels.max_sweep import max_long, max_sweep
from .triton_kernels.sets import Side

# Streamed tokens for which a program loads its held rows once, if there are programs enough without.
_TOKENS, _PROGRAMS = 512, 2048


class Directed(NamedTuple):
    """What one direction is to give: sums over one side's tokens, and where each found its maximum, unless None."""

    scores: Tensor | None
    chosen: Tensor | None


NOTHING = Directed(None, None)


def unfilled(x: TokenSets, y: TokenSets, request: Request) -> list[Tensor]:
    """`empty_kept`, as buffers that kernels store to."""
    shapes = empty_kept(x.with_tokens(x.tokens.to("meta")), y, request)
    return [launching.empty(*each.shape, dtype=each.dtype, device=x.tokens.device) for each in shapes]


def max_launches(x: TokenSets, y: TokenSets, scores: list[Tensor], kept: list[Tensor], request: Request) -> None:
    """Fills the scores that are asked for, [N, M] or [N, candidates], and, if there are any, the positions kept of them."""
    if not x.count or not y.count:
        return
    found = iter(Directed(each, kept[k][0] if kept else None) for k, each in enumerate(scores))
    rows, cols = (next(found) if asked else NOTHING for asked in (request.rows, request.cols))
    tile = held_rows(launching.architecture(x.tokens.device), x.tokens.dtype, request.precision)
    short_x, short_y = (next_power(each.longest) <= tile for each in (x, y))
    if request.rows and request.cols:
        if not short_x and not short_y:
            _launch(x, y, rows, NOTHING, request, held_is_x=True)
            _launch(y, x, cols, NOTHING, request, held_is_x=False)
            return
        # The shorter side: less of its tile is padding.
        hold_x = short_x and (x.longest <= y.longest or not short_y)
    else:
        # Sets that are short on the other side alone fill a tile best there.
        hold_x = short_x or not short_y if request.rows else short_x and not short_y
    if hold_x:
        _launch(x, y, rows, cols, request, held_is_x=True)
    else:
        _launch(y, x, cols, rows, request, held_is_x=False)


def _launch(
    held: TokenSets, streamed: TokenSets, of_held: Directed, of_streamed: Directed, request: Request, held_is_x: bool
) -> None:
    scores = of_held.scores if of_held.scores is not None else of_streamed.scores
    assert scores is not None
    arch, dtype, width = launching.architecture(scores.device), held.tokens.dtype, held.tokens.shape[1]
    candidates = request.candidates
    config = max_config(
        arch,
        dtype,
        width,
        request.precision,
        rows=held.longest if candidates else held.count * next_power(held.longest),
        cols=streamed.longest,
        positions=of_held.chosen is not None,
        streamed=of_streamed.scores is not None,
    )
    long = held.longest > config.block_m
    span = config.block_m if candidates or long else next_power(held.longest)
    sets, batches = (1, streamed.count) if candidates or long else _batches(held, streamed, config, span)
    groups = cdiv(held.count, config.block_m // span)
    strides = scores.stride() if held_is_x else scores.stride()[::-1]
    arguments = {
        "held": side_of(held),
        "streamed": side_of(streamed),
        "held_scores": of_held.scores,
        "score_strides": strides,
        "held_chosen": of_held.chosen,
        "candidates": candidates,
        "d": width,
        "PAIRS": (1 if held_is_x else 2) if candidates else 0,
        "WHOLE": width <= whole_width(arch, dtype, request.precision),
        "EVEN": width > 0 and width % config.block_k == 0,
        "PRECISION": request.precision,
        "INTERPRETED": launching.interpreting(),
    }
    programs = (held.count if not held_is_x else streamed.count) if candidates else groups * batches
    if long:
        launching.run(max_long, (programs,), config, arguments)
        return
    arguments |= {
        "streamed_scores": of_streamed.scores,
        "streamed_chosen": of_streamed.chosen,
        "groups": groups,
        "batches": batches,
        "SPAN": span,
        "SETS": sets,
    }
    launching.run(max_sweep, (programs,), config, arguments)


def _batches(held: TokenSets, streamed: TokenSets, config: Config, span: int) -> tuple[int, int]:
    """Streamed sets of a program, and how many such batches there are."""
    pairs = cdiv(held.count, config.block_m // span) * streamed.count
    sets = max(1, min(_TOKENS // max(1, streamed.longest), pairs // _PROGRAMS))
    sets = 1 << (sets.bit_length() - 1)  # a kernel is compiled for each number
    return sets, cdiv(streamed.count, sets)


def side_of(sets: TokenSets) -> Side:
    """The sets as the kernels take them."""
    keep = None if sets.keep is None else sets.keep.contiguous().view(torch.uint8)
    tokens = launching.near(sets.tokens)
    return Side(
        tokens,
        tokens.stride(),
        sets.starts,
        sets.lengths,
        ends_of(sets),
        keep,
        sets.count,
        sets.tokens.shape[0],
    )


def ends_of(sets: TokenSets) -> Tensor:
    """int64 [N]: one more than the last token of each set that counts, 0 for an empty set. A padded tail is not visited."""
    if sets.keep is None or not sets.padded:
        return sets.lengths if sets.keep is None else sets.lengths.masked_fill(sets.counts() == 0, 0)
    places = torch.arange(1, sets.padded + 1, device=sets.keep.device)
    return (sets.keep.view(sets.count, sets.padded) * places).amax(1)
