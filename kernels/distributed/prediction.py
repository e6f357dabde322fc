"""What a step sends, by formula: the account of `traffic.py` before anything is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from .exchange import check_exchange
from .ring import owner
from .shards import AGREEMENT_BYTES

#: Vectors along the columns that a ring brings home in the forward and sends along in the backward: a log-sum-exp is two of
#: float64; the score of the pair, and an upstream gradient for each of the two, are of the results' dtype.
_LOG_SUM_EXP_BYTES = 2 * 8


def predicted_traffic(
    loss: str,
    sizes: Sequence[int],
    rank: int,
    width: int,
    *,
    strategy: str = "gather",
    dtype: torch.dtype = torch.float32,
    wire_dtype: torch.dtype | None = None,
    node_size: int | None = None,
    gradients: tuple[bool, bool] = (True, True),
    backward: bool = True,
    first_call: bool = False,
) -> Counter[str]:
    """Bytes that a rank sends in a step of `ClipLoss` or `SigLipLoss`, by purpose as in `Traffic.sent`.

    For W ranks of n_r pairs, N in all, n_max the most of a rank, features of D numbers of f bytes on the wire, and results
    of g bytes (4; 8 for float64 features). In a ring, `last` is the shard that this rank does not pass on:

        all             agreement   256 (W - 1) for each agreement: 1 by gather, 3 in a ring, 1 more at a loss's first call
                        value       2 (W - 1) g
        clip, gather    features    2 (W - 1) n_max D f
                        gradients   2 (W - 1) n_max D g, half of it where one side wants none
        siglip, gather  features    (W - 1) n_max D f, of the texts
                        gradients   (W - 1) n_max D g
        clip, ring      features    2 (N - n_last) D f: forward and backward
                        statistics  (N + N - n_last) (16 + g)
                        upstream    (N - n_last) 2 g
                        gradients   N D g, of the texts
        siglip, ring    features    (N - n_last) D f: its gradients are found in the forward
                        gradients   N D g
                        upstream    (W - 1) g, to see that it is the same on all ranks

    Args:
        loss: "clip" with both directions and without extra negatives, or "siglip"; reduced to a value.
        sizes: pairs of each rank.
        rank: this rank.
        width: D.
        strategy, wire_dtype, node_size: as in `Exchange`.
        dtype: of the features.
        gradients: whether the images and the texts want one on any rank; where neither does, the scale does.
        backward: whether there is one; `gradients` are wanted all the same.
        first_call: whether the loss object has not been called before.

    Raises:
        ValueError: an unknown loss, or options that `Exchange` does not take.
    """
    check_exchange(strategy, wire_dtype, node_size)
    if loss not in ("clip", "siglip"):
        raise ValueError(f'loss={loss!r}: expected "clip" or "siglip"')
    world, of_images, of_texts = len(sizes), *gradients
    result = 8 if dtype == torch.float64 else 4
    feature = width * (dtype.itemsize if wire_dtype is None else min(dtype.itemsize, wire_dtype.itemsize))
    sent = Counter(value=2 * (world - 1) * result)
    sent["agreement"] = ((3 if strategy == "ring" else 1) + first_call) * (world - 1) * AGREEMENT_BYTES
    if strategy == "gather":
        sides = (of_images, of_texts) if loss == "clip" else (of_texts,)
        padded = (world - 1) * max(sizes)
        sent["features"] = len(sides) * padded * feature
        sent["gradients"] = sum(sides) * padded * width * result if backward else 0
        return +sent
    total = sum(sizes)
    passed_on = total - sizes[owner(rank, world - 1, world, node_size)]
    sent["features"] = passed_on * feature
    if loss == "siglip":
        sent["gradients"] = total * width * result if of_texts else 0
        sent["upstream"] = (world - 1) * result if of_texts and backward else 0
        return +sent
    sent["statistics"] = total * (_LOG_SUM_EXP_BYTES + result)
    if backward:
        sent["features"] += passed_on * feature
        sent["statistics"] += passed_on * (_LOG_SUM_EXP_BYTES + result)
        sent["upstream"] = passed_on * 2 * result
        sent["gradients"] = total * width * result if of_texts else 0
    return +sent
