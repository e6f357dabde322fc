"""Contrast of mixed samples with both of their partners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contrastive import LogSumExp, PairScore
from ..contrastive.arguments import check_indices, factor, vector
from .base import check_pairs, check_scalar
from .batch import PairBatch, Side
from .directions import TwoDirectionLoss
from .log_domain import cross_entropy
from .positives import row_scores


class VicinityMixLoss(TwoDirectionLoss):
    """Cross-entropy of mixed samples against two partners each (BiMixCo of MindEye, arXiv:2305.18274).

    Sample i of the first modality is mixed, lam_i a_i + (1 - lam_i) a_perm(i), and its target is P_ii = lam_i,
    P_i,perm(i) = 1 - lam_i, or 1 on itself where perm(i) = i. With S_ij = logit_scale <x_i, y_j>, x the embeddings of
    the mixed samples and y of the second modality as it is, the terms of pair i are

        -sum_j P_ij log softmax_j(S_ij),    -sum_j P_ji log softmax_j(S_ji),

    the latter along column i, whose targets need not add up to 1. MixCo (arXiv:2010.06300) in both directions; the loss
    of M3CoL (arXiv:2409.17777). Where perm(i) = i the authors' code overwrites the target on the diagonal by 1 - lam_i.

    Args:
        direction_weights: (mixed to whole, whole to mixed). A direction of weight 0 is not computed.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
    """

    def __init__(self, *, direction_weights: tuple[float, float] = (0.5, 0.5), **options: Any) -> None:
        super().__init__(direction_weights=direction_weights, **options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        perm: Tensor,
        lam: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned before the mixing: image i belongs to text i.

        Args:
            image_features: x [batch, D], of the mixed samples, normalised as the model defines it; any floating dtype.
            text_features: y [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            perm: int64 [batch], the row of this rank that sample i is mixed with; `vicinity_mix` gives it.
            lam: float [batch], the share of sample i itself, from 0 to 1.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, an entry of perm that is no row (on CPU).
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        n, device = image_features.shape[0], image_features.device
        check_indices(perm, "perm", n, "sample", device)
        _check_rows(perm, n)
        dtype = torch.promote_types(torch.promote_types(image_features.dtype, text_features.dtype), torch.float32)
        lam = vector(lam, "lam", n, "sample", dtype, device)
        given_away = torch.where(perm == torch.arange(n, device=device), 0, 1 - lam)
        # S_i,perm(i), of pairs that are all on this rank
        crossed = row_scores(image_features, text_features[perm], factor(logit_scale, "logit_scale", dtype, device))

        batch = PairBatch(Side(image_features), Side(text_features), self._exchange())
        of_rows, of_cols = self._reduced(
            batch, lambda view: [LogSumExp(exclude=view.own), PairScore(view.own)], scale=logit_scale
        )
        by_row = by_col = None
        if of_rows:
            others, own = of_rows
            # (1 - lam_i) (S_ii - S_i,perm(i)) is what the second partner changes.
            by_row = cross_entropy(others, own) + given_away * (own - crossed)
        if of_cols:
            others, own = of_cols
            received = torch.zeros_like(own).index_add(0, perm, given_away)
            changed = torch.zeros_like(own).index_add(0, perm, given_away * (own[perm] - crossed))
            by_col = (1 - given_away + received) * cross_entropy(others, own) + changed
        loss = self._combined(by_row, by_col, batch)
        return {"contrastive_loss": loss} if output_dict else loss


def _check_rows(perm: Tensor, n: int) -> None:
    within = ((perm >= 0) & (perm < n)).all()
    if torch.compiler.is_compiling() or perm.device.type != "cpu":
        # Checked where the tensor is, without waiting for it.
        torch._assert_async(within, "perm: an entry is no row of this rank's batch")
    elif not within:
        raise ValueError(
            f"perm holds {int(perm.min())} to {int(perm.max())}: expected rows of this rank's batch, 0 to {n - 1}"
        )


def vicinity_mix(
    inputs: Tensor, *, alpha: float = 0.15, portion: float = 0.5, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix samples of one modality with each other for `VicinityMixLoss`.

    A portion of the samples becomes lam_i a_i + (1 - lam_i) a_perm(i), lam_i ~ Beta(alpha, alpha); the others stay as
    they are, with lam_i = 1 and perm(i) = i. perm is a random permutation where samples are mixed.

    Args:
        inputs: [batch, ...], floating point: images, signals, or embeddings.
        alpha: both parameters of the Beta distribution; MindEye's is 0.15.
        portion: the chance of each sample to be mixed.
        generator: of random numbers, on the CPU; None: torch's default.

    Returns:
        (mixed, perm, lam): [batch, ...] like inputs; int64 [batch]; float32 [batch].

    Raises:
        ValueError: values outside their range.
    """
    if not alpha > 0 or not 0 <= portion <= 1:
        raise ValueError(f"alpha={alpha!r}, portion={portion!r}: expected a positive number and one from 0 to 1")
    n = inputs.shape[0]
    perm = torch.randperm(n, generator=generator)
    # float64: at small alpha both gamma variates of a Beta variate can be too small for float32.
    both = torch._standard_gamma(torch.full((n, 2), alpha, dtype=torch.float64), generator=generator)
    lam = both[:, 0] / both.sum(1)
    chosen = torch.rand(n, generator=generator) < portion
    perm, lam = torch.where(chosen, perm, torch.arange(n)), torch.where(chosen, lam, 1.0)
    perm, lam = perm.to(inputs.device), lam.to(inputs.device, torch.float32)
    share = lam.to(inputs.dtype).view(n, *[1] * (inputs.dim() - 1))
    return share * inputs + (1 - share) * inputs[perm], perm, lam
