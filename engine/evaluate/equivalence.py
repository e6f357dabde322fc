"""Which images and captions are correct for each other, and the best score that ids alone allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..strict import StrictModel
from .measure import Measure


class IdCeiling(StrictModel):
    """The best R@1 any model could reach if only the id counted, see :func:`id_ceiling`."""

    image_to_text: Measure
    text_to_image: Measure


def ambiguous_keys(keys: Tensor, ids: Tensor) -> Tensor:
    """``keys`` where images of at least two ids share the value, -1 elsewhere.

    Within one id a shared key adds nothing, since the id agrees already. int64 [N], int64 [N] -> int64 [N].
    """
    if len(keys) == 0:
        return keys
    _, group = keys.unique(return_inverse=True)
    groups = int(group.max()) + 1
    largest = torch.full((groups,), torch.iinfo(torch.int64).min, device=keys.device)
    smallest = torch.full((groups,), torch.iinfo(torch.int64).max, device=keys.device)
    largest.scatter_reduce_(0, group, ids, "amax")
    smallest.scatter_reduce_(0, group, ids, "amin")
    return keys.masked_fill((largest == smallest)[group], -1)


def match_keys(
    image_ids: Tensor,
    text_ids: Tensor,
    equivalences: Sequence[Tensor],
    owner_text: Tensor,
    owner_image: Tensor,
) -> tuple[Tensor, Tensor]:
    """Key columns for :func:`retrieval_ranks`.

    A caption inherits the equivalences of every image it describes, which may be several per caption: each value
    gets a column of its own on the text side, beside as many copies of the image's column.

    Args:
        image_ids: int64 [N].
        text_ids: int64 [M].
        equivalences: int64 [N] each, -1 where unknown (for example: the number of the pixel-identical drawing).
        owner_text, owner_image: int64 [P] each; caption ``owner_text[p]`` describes image ``owner_image[p]``.

    Returns:
        int64 [N, K] and int64 [M, K].
    """
    image_columns, text_columns = [image_ids], [text_ids]
    for equivalence in equivalences:
        values = ambiguous_keys(equivalence, image_ids)
        pairs = torch.stack([owner_text, values[owner_image]], dim=1)
        pairs = pairs[pairs[:, 1] != -1].unique(dim=0)
        first = torch.searchsorted(pairs[:, 0].contiguous(), pairs[:, 0].contiguous())
        slot = torch.arange(len(pairs), device=pairs.device) - first
        width = int(slot.max()) + 1 if len(pairs) else 0
        table = torch.full((len(text_ids), width), -1, dtype=torch.int64, device=text_ids.device)
        table[pairs[:, 0], slot] = pairs[:, 1]
        image_columns += [values] * width
        text_columns += list(table.unbind(1))
    return torch.stack(image_columns, dim=1), torch.stack(text_columns, dim=1)


def id_ceiling(image_ids: Tensor, drawings: Tensor, text_ids: Tensor) -> IdCeiling:
    """The best expected R@1 of any model if only the id counted, given groups of pixel-identical images.

    Identical images have identical embeddings. Image to text: a model can place one id first for all images of a
    group, at best the commonest id of the group; with g ids of one image each that is 1/g per query. Text to image:
    a caption whose id has a drawing of its own can be right; otherwise the images of the best group tie, and a tie
    broken at random gives (images of the id) / (images of the group), again 1/g. This is the expected value and not
    the best case, because no model can see which of the identical images is the wanted one.

    Args:
        image_ids, drawings: int64 [N]; drawing -1 means "like no other image".
        text_ids: int64 [M], the ids of the captions; items whose id has no partner ask nothing and are left out.
    """
    if len(image_ids) == 0:
        return IdCeiling(image_to_text=float("nan"), text_to_image=float("nan"))
    # An unknown drawing is a group of its own: number it above all known ones.
    alone = torch.arange(len(drawings), device=drawings.device) + drawings.max().clamp(min=0) + 1
    _, group = torch.where(drawings == -1, alone, drawings).unique(return_inverse=True)
    group_size = group.bincount()
    pairs, images = torch.stack([image_ids, group], dim=1).unique(dim=0, return_counts=True)
    pair_id, pair_group = pairs.unbind(1)

    # Images whose id has no caption ask nothing.
    asking = images * torch.isin(pair_id, text_ids)
    commonest = torch.zeros_like(group_size).scatter_reduce_(0, pair_group, asking, "amax")
    image_to_text = float(commonest.sum() / asking.sum())

    # An id's chance is that of its best group; a group of its own gives 1.
    ids, id_number = pair_id.unique(return_inverse=True)
    share = images.double() / group_size[pair_group]
    chance = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    chance.scatter_reduce_(0, id_number, share, "amax")
    place = torch.searchsorted(ids, text_ids).clamp(max=len(ids) - 1)
    asked = ids[place] == text_ids
    return IdCeiling(image_to_text=image_to_text, text_to_image=float(chance[place[asked]].mean()))
