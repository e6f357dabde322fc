"""The picture of a merged image: which patches became one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contrastive.arguments import described


def draw_merged_regions(
    image: Any,
    source: Tensor,
    grid: tuple[int, int],
    *,
    outline: tuple[int, int, int] | None = (255, 255, 255),
) -> Tensor:
    """An image whose patches have the mean colour of all that were merged with them, with outlines between regions.

    A region need not hang together: patches of one token have one colour wherever they are.

    Args:
        image: uint8 [H, W, 3]: a tensor, an array or a PIL image in RGB; H and W at least the grid's, not necessarily
            multiples.
        source: int64 [N], the place of every first token, one sample of `merged_sources`; or [S, N] of zeros and ones,
            one sample of `merge_source`. The last rows * columns of the N are patches, row by row; those before are
            left out.
        grid: (rows, columns) of patches.
        outline: its colour; None: no outlines.

    Returns:
        uint8 [H, W, 3]; `PIL.Image.fromarray(picture.numpy())` makes it an image.

    Raises:
        ValueError: an image or a source that does not fit.
    """
    pixels = _pixels(image)
    rows, columns = grid
    height, width, _ = pixels.shape
    if source.dim() == 2:
        source = source.argmax(0)
    if source.dim() != 1 or source.shape[0] < rows * columns:
        raise ValueError(
            f"source is {described(source)}: expected at least {rows * columns} places, of a {rows} x {columns} grid"
        )
    if height < rows or width < columns:
        raise ValueError(
            f"the image has {height} x {width} pixels: expected at least {rows} x {columns}, one for each patch"
        )
    places = source[source.shape[0] - rows * columns :].cpu()
    _, patches = places.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    down = torch.arange(height) * rows // height
    across = torch.arange(width) * columns // width
    regions = patches.view(rows, columns)[down][:, across]
    picture = _means(pixels, regions)
    if outline is not None:
        picture[_borders(regions)] = torch.tensor(outline, dtype=torch.uint8)
    return picture


def _pixels(image: Any) -> Tensor:
    if not isinstance(image, Tensor):
        import numpy

        image = torch.from_numpy(numpy.array(image))
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[-1] != 3:
        raise ValueError(f"image is {described(image)}: expected uint8 [height, width, 3], colours from 0 to 255")
    pixels: Tensor = image.cpu()
    return pixels


def _means(pixels: Tensor, regions: Tensor) -> Tensor:
    flat = regions.flatten()
    count = int(flat.max()) + 1
    sums = torch.zeros(count, 3).index_add_(0, flat, pixels.flatten(0, 1).float())
    means = sums / flat.bincount(minlength=count).unsqueeze(-1)
    return means.round().to(torch.uint8)[flat].view(pixels.shape)


def _borders(regions: Tensor) -> Tensor:
    """bool [H, W]: pixels whose right or lower neighbour is of another region."""
    found = torch.zeros_like(regions, dtype=torch.bool)
    found[:, :-1] |= regions[:, 1:] != regions[:, :-1]
    found[:-1] |= regions[1:] != regions[:-1]
    return found
