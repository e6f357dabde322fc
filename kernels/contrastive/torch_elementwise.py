"""exp and softplus to the last digit, and fast, on any device; the slope of a paced score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reductions import Paced


def finite(maximum: Tensor) -> Tensor:
    """0 where the maximum is infinite, so that exp(S - maximum) is 0 or inf there, never NaN."""
    return maximum.masked_fill(maximum.isinf(), 0)


def exp_(scores: Tensor) -> Tensor:
    """exp, in place, of scores whose largest is 0 or more: what would underflow becomes the least normal number.

    Beside a 1 in the same sum that is nothing, and torch's exp on CPU takes ten times as long where it underflows.
    """
    return scores.clamp_min_(math.log(torch.finfo(scores.dtype).tiny) + 0.1).exp_()


def softplus(scores: Tensor, out: Tensor | None = None) -> Tensor:
    """log(1 + exp(scores)); `scores` stay as they are."""
    # F.softplus turns linear above its threshold, which float64 would notice.
    if scores.device.type != "cpu":
        return torch.logaddexp(scores, scores.new_zeros(()), out=out)
    # On CPU logaddexp takes ten times as long as exp, for its log1p. With u = 1 + e rounded, log1p(e) is
    # log(u) + (e - (u - 1)) / u to the last digit: what rounding took from u is known exactly.
    small = exp_(torch.abs(scores, out=out).neg_())
    one_more = small + 1
    spare = one_more - 1
    small.sub_(spare).div_(one_more).add_(one_more.log_())
    return small.add_(torch.clamp(scores, min=0, out=spare))


def pace_slope(scores: Tensor, pace: Paced) -> Tensor:
    """gain * relu(slope * S + offset), the derivative of a paced score by S; `scores` stay as they are."""
    return torch.mul(scores, pace.slope).add_(pace.offset).clamp_min_(0).mul_(pace.gain)


def paced(scores: Tensor, pace: Paced, slope: Tensor, out: Tensor) -> Tensor:
    """slope * (S - center), with the slope of `pace_slope`; `out` may be the scores themselves."""
    return torch.sub(scores, pace.center, out=out).mul_(slope)
