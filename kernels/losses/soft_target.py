"""Cross-entropy against soft targets: the softmax of a second similarity of the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..contrastive import LogSumExp, PairScore, Reduction, SoftmaxMean
from ..distributed import Exchange
from .base import check_matrix, check_pairs, check_scalar
from .batch import PairBatch, Side, View
from .directions import TwoDirectionLoss
from .log_domain import cross_entropy


class SoftTargetLoss(TwoDirectionLoss):
    """Cross-entropy against alpha * softmax of a teacher's similarity + (1 - alpha) * the pair itself.

    With S_ij = logit_scale <image_i, text_j> and T_ij = teacher_logit_scale <teacher_image_i, teacher_text_j>, the
    term of row i is

        -sum_j y_ij log softmax_j(S_ij),  y_ij = alpha softmax_j(T_ij) + (1 - alpha) [i = j],

    that of column j the same along the columns. The target of momentum distillation (ALBEF, arXiv:2107.07651) without
    its queues, for which there is `MomentumDistillationLoss`; of a loss with several teachers, `DistillClipLoss`.
    It is computed as -log softmax_j(S_ij)[i] + alpha m_i (S_ii - E_i), m_i the teacher's probability of all pairs but
    (i, i) and E_i the mean of S_ij over j != i under the teacher's softmax: nothing cancels where both agree on the
    pair. Neither S nor T is stored, and no gradient goes to the teacher.

    Args:
        alpha: weight of the soft target, from 0 to 1; a plain attribute, so that a schedule may set it.
        direction_weights: (image to text, text to image). A direction of weight 0 is not computed.
        options: rank, world_size, local_loss, group, strategy, reduction, as in `ClipLoss`.

    Raises:
        ValueError: options that this version does not have, or values outside their range.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        direction_weights: tuple[float, float] = (0.5, 0.5),
        **options: Any,
    ) -> None:
        super().__init__(direction_weights=direction_weights, **options)
        self.alpha = checked_alpha(alpha)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        teacher_image_features: Tensor,
        teacher_text_features: Tensor,
        teacher_logit_scale: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch whose rows are aligned: image i belongs to text i.

        Args:
            image_features: [batch, D], normalised as the model defines it; any floating dtype.
            text_features: [batch, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            teacher_image_features: [batch, D'], of any width and floating dtype.
            teacher_text_features: [batch, D'].
            teacher_logit_scale: like logit_scale; None: its value.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A scalar in float32 (float64 for float64 features); [batch] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        check_pairs(image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        teacher_scale = logit_scale if teacher_logit_scale is None else teacher_logit_scale
        batch = taught_batch(
            image_features,
            text_features,
            [teacher_image_features],
            [teacher_text_features],
            [teacher_scale],
            self._exchange(),
        )
        teacher_own = batch.teacher_scores()

        def formula(*results: Tensor) -> Tensor:
            one_hot, gap = soft_cross_entropy(results, teacher_own)
            return one_hot + self.alpha * gap

        reduced = self._reduced(batch, soft_targets, scale=logit_scale)
        loss = self._combined(*self._each(formula, reduced), batch)
        return {"contrastive_loss": loss} if output_dict else loss


class SoftClipLoss(SoftTargetLoss):
    """Cross-entropy against the targets' own similarities (SoftCLIP of MindEye, arXiv:2305.18274).

    With S_ij = logit_scale <image_i, text_j> and T_ij = target_logit_scale <text_i, text_j>, the term of row i is

        -sum_j softmax_j(T_ij) log softmax_j(S_ij),

    that of column j the same along the columns of S, T being symmetric. The texts are the fixed targets that the
    images are to hit (in the paper CLIP's embeddings, and the images brain scans); no gradient goes through T.
    Features of any width: D = 197,376 there. alpha < 1 mixes in the pair itself, as in `SoftTargetLoss`, which this is
    with the texts as their own teacher; the options are its own.
    """

    def forward(  # type: ignore[override]  # the teacher is among the features
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        target_logit_scale: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Arguments, returns and errors as in `SoftTargetLoss`; target_logit_scale None: the value of logit_scale."""
        return super().forward(
            image_features, text_features, logit_scale, text_features, text_features, target_logit_scale, output_dict
        )


def taught_batch(
    images: Tensor,
    texts: Tensor,
    teacher_images: Sequence[Tensor],
    teacher_texts: Sequence[Tensor],
    teacher_scales: Sequence[float | Tensor],
    exchange: Exchange | None,
) -> PairBatch:
    """The pairs with their teachers', checked.

    Raises:
        ValueError, TypeError: a teacher whose embeddings are not those of the batch's pairs.
    """
    n = images.shape[0]
    for x, y, scale in zip(teacher_images, teacher_texts, teacher_scales, strict=True):
        check_matrix("a teacher's image features", x)
        check_matrix("a teacher's text features", y)
        check_scalar("a teacher's logit scale", scale)
        if x.shape != y.shape or x.shape[0] != n:
            raise ValueError(
                f"a teacher's image features {list(x.shape)} and text features {list(y.shape)}: expected "
                f"[{n}, width] both, one embedding of each image and text of the batch"
            )
    x_side, y_side = Side(images, taught=teacher_images), Side(texts, taught=teacher_texts)
    return PairBatch(x_side, y_side, exchange, teacher_scales)


def soft_targets(view: View) -> list[Reduction]:
    """What `soft_cross_entropy` needs of a direction: of S without the pair, the pair, and two for each teacher."""
    asked: list[Reduction] = [LogSumExp(exclude=view.own), PairScore(view.own)]
    for teacher in view.teachers:
        asked += [LogSumExp(exclude=view.own, of=teacher), SoftmaxMean(under=teacher, exclude=view.own)]
    return asked


def soft_cross_entropy(results: Sequence[Tensor], teacher_own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each owner: -log softmax(S)_ii, and what the cross-entropy against the teachers' mean softmax has beyond it.

    sum_j t_j (S_ii - S_ij) = m (S_ii - E), m = sum_{j != i} t_j, and E the mean of the others under t.

    Args:
        results: of `soft_targets`.
        teacher_own: T_ii of each teacher.
    """
    others, own, *taught = results
    gaps = [
        torch.sigmoid(teacher_others - teacher_score) * (own - mean)
        for teacher_others, mean, teacher_score in zip(taught[::2], taught[1::2], teacher_own, strict=True)
    ]
    return cross_entropy(others, own), torch.stack(gaps).mean(0) if len(gaps) > 1 else gaps[0]


def checked_alpha(alpha: float) -> float:
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r}: expected a number from 0 to 1")
    return float(alpha)
