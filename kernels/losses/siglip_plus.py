"""The sigmoid loss with several positives."""

from __future__ import annotations

from torch import Tensor

from ..contrastive import Reduction, SameId, SoftplusSum, similarity_reduce
from ..distributed import gather, gather_counts, gather_ids
from .base import check_scalar
from .batch import PairBatch, Side, View
from .positives import paired_ids
from .siglip import SigLipLoss


class SigLipPlusLoss(SigLipLoss):
    """Pairwise sigmoid loss (SigLIP, arXiv:2303.15343) whose positives are all pairs of equal ids.

    With S_ij = logit_scale <image_i, text_j> + logit_bias, and z_ij = +1 where the ids of image i and text j are equal,
    -1 otherwise, the term of image i is

        sum_j log(1 + exp(-z_ij S_ij))

    over all texts of the whole batch, and the loss is the terms' mean over the images. An image may have any number of
    texts, and a text any number of images: K captions of one image are [K batch] texts with the image's id each.
    Duplicates that `SigLipLoss` pushes apart are positives here. An image without a text has negatives alone.

    Args:
        as `SigLipLoss`, which it is where no ids are given.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch.

        Args:
            image_features: [n, D], normalised as the model defines it; any floating dtype.
            text_features: [m, D].
            logit_scale: the factor itself (not its logarithm), a float or a tensor of shape [] or [1].
            logit_bias: a float, a tensor of shape [] or [1], or None for 0.
            output_dict: return {"contrastive_loss": loss}.
            image_ids: int64 [n], of one meaning on all ranks. All ranks pass ids or none does. Without any, image i
                belongs to text i alone.
            text_ids: int64 [m]. Where image i belongs to text i one of the two serves both.

        Returns:
            A scalar in float32 (float64 for float64 features); [n] for reduction="none".

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
        """
        if image_ids is None and text_ids is None:
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        check_scalar("logit_scale", logit_scale)
        check_scalar("logit_bias", logit_bias)
        of_images, of_texts = paired_ids(image_features, text_features, image_ids, text_ids)
        bias = 0.0 if logit_bias is None else logit_bias
        exchange, group = self._exchange(), self._group()
        if exchange is not None and exchange.strategy == "ring":
            batch = PairBatch(Side(image_features, of_images), Side(text_features, of_texts), exchange)
            (terms,), _ = batch.reduce(scale=logit_scale, bias=bias, rows=_sigmoids_by_id)
            loss = self._finish(terms, batch.shards)
            return {"contrastive_loss": loss} if output_dict else loss
        images = gather_counts(len(of_images), device=image_features.device, group=group)
        texts, (all_texts,) = gather(text_features, group=group, wire_dtype=self.wire_dtype)
        (terms,), _ = similarity_reduce(
            image_features,
            all_texts,
            scale=logit_scale,
            bias=bias,
            rows=[SoftplusSum(positive=SameId(of_images, gather_ids(of_texts, texts)))],
        )
        loss = self._finish(terms, images)
        return {"contrastive_loss": loss} if output_dict else loss


def _sigmoids_by_id(view: View) -> tuple[Reduction, ...]:
    return (SoftplusSum(positive=view.same),)
