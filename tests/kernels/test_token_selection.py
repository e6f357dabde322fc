"""Merging over frames, ranking, pooling, and the picture of merged regions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from PIL import Image

from pairtile.kernels.token_merging import (
    bipartite_matching,
    bounding_boxes,
    complete_graph_matching,
    draw_merged_regions,
    join_frames,
    merge_frames,
    merge_tokens,
    pitome_matching,
    pool_windows,
    rank_tokens,
)


def video(frames: int = 6, tokens: int = 9) -> torch.Tensor:
    return torch.randn(frames, tokens, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- frames ---------------------------------------------------------------------------------------------------------


def test_within_a_frame_each_merges_by_itself():
    x = video()
    merged, size = merge_frames(x, x, 3, prefix=1)
    expected, expected_size = merge_tokens(x[2:3], bipartite_matching(x[2:3], 3, protected=1))
    assert merged.shape == (6, 6, 8)
    torch.testing.assert_close(merged[2:3], expected)
    torch.testing.assert_close(size[2:3], expected_size)


@pytest.mark.parametrize("match", [bipartite_matching, complete_graph_matching, partial(pitome_matching, margin=0.5)])
def test_across_frames_what_does_not_move_merges(match):
    """Two pairs of frames; the second of a pair is the first, but for its class token."""
    x = video(4)
    x[1::2, 1:] = x[::2, 1:]
    x.requires_grad_()
    merged, size = merge_frames(x, x, 8, group=2, prefix=1, match=match)
    assert merged.shape == (2, 10, 8)
    # Class tokens of both frames in front, then every still patch once.
    assert torch.equal(merged[:, :2], x[:, 0].view(2, 2, 8))
    if not isinstance(match, partial):
        assert (size[:, 2:] == 2).all()
        torch.testing.assert_close(merged[:, 2:], x[::2, 1:])
    merged.sum().backward()
    torch.testing.assert_close(x.grad.sum(), merged.new_tensor(2 * 10 * 8.0))


def test_a_clip_is_joined_with_its_neighbour_again():
    x = video(8)
    clips, size = merge_frames(x, x, 4, group=2, prefix=1)
    assert clips.shape == (4, 14, 8)
    longer, size = merge_frames(clips, clips, 10, size, group=2, prefix=2)
    assert longer.shape == (2, 18, 8)
    # Sizes count the tokens of all four frames.
    assert size.sum(1).squeeze(-1).tolist() == [36, 36]
    assert torch.equal(longer[:, :4], x[:, 0].view(2, 4, 8))


def test_joined_frames_keep_prefix_tokens_in_front():
    x = torch.arange(12).view(4, 3, 1).double()
    assert join_frames(x, 2, prefix=1).squeeze(-1).tolist() == [[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]
    with pytest.raises(ValueError, match="a multiple of group=3"):
        join_frames(x, 3)
    with pytest.raises(ValueError, match=r"metric is .* one for each token"):
        merge_frames(x, x[1:], 1)


def test_windows_are_means():
    x = torch.randn(2, 4, 6, 6, 3)
    pooled = pool_windows(x, (2, 3, 2))
    assert pooled.shape == (2, 2, 2, 3, 3)
    torch.testing.assert_close(pooled[1, 0, 1, 2], x[1, 0:2, 3:6, 4:6].mean((0, 1, 2)))
    with pytest.raises(ValueError, match="multiples of the window"):
        pool_windows(x, (3, 1, 1))


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "l1", "l2"])
def test_ranks_follow_the_similarity(similarity):
    vector = torch.tensor([[1.0, 0.0]])
    tokens = torch.tensor([[[0.0, 1.0], [1.0, 0.1], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    ranking = rank_tokens(tokens, vector, similarity=similarity)
    assert ranking.order.tolist() == [[2, 3, 1, 0, 4]]
    assert ranking.top(3).tolist() == [[1, 2, 3]]
    assert ranking.mask(2).tolist() == [[False, False, True, True, False]]
    assert torch.equal(ranking.keep(tokens, 3), tokens[:, 1:4])


def test_crops_hold_the_nearest_patches():
    index = torch.tensor([[1, 6], [11, 11]])
    assert bounding_boxes(index, (3, 4)).tolist() == [[0, 1, 2, 3], [2, 3, 3, 4]]


def test_bad_ranks_are_told():
    with pytest.raises(ValueError, match=r"expected \[2, 4\], one for each sample"):
        rank_tokens(torch.randn(2, 3, 4), torch.randn(4))
    with pytest.raises(ValueError, match='expected "cosine"'):
        rank_tokens(torch.randn(2, 3, 4), torch.randn(2, 4), similarity="dot")


# ---- the picture ----------------------------------------------------------------------------------------------------


def test_regions_have_their_mean_colour_and_outlines():
    image = torch.zeros(4, 6, 3, dtype=torch.uint8)
    image[:, :2], image[:, 2:4], image[:2, 4:] = 100, 50, 200
    # A class token, then 2 x 3 patches: the left column and the one beside it are a region, the right ones are apart.
    source = torch.tensor([0, 7, 7, 3, 7, 7, 5])
    plain = draw_merged_regions(image, source, (2, 3), outline=None)
    assert (plain[:, :4] == 75).all()
    assert (plain[:2, 4:] == 200).all()
    assert (plain[2:, 4:] == 0).all()
    outlined = draw_merged_regions(Image.fromarray(image.numpy()), source, (2, 3), outline=(255, 0, 0))
    red = (outlined == torch.tensor([255, 0, 0], dtype=torch.uint8)).all(-1)
    assert red[:, 3].all()
    assert red[1, 4:].all()
    assert red.sum() == 4 + 2
    dense = torch.nn.functional.one_hot(source).T
    assert torch.equal(draw_merged_regions(image, dense, (2, 3), outline=None), plain)


def test_a_picture_that_does_not_fit_is_told():
    image = torch.zeros(4, 6, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 6 places, of a 2 x 3 grid"):
        draw_merged_regions(image, torch.zeros(5, dtype=torch.int64), (2, 3))
    with pytest.raises(ValueError, match="expected uint8"):
        draw_merged_regions(image.float(), torch.zeros(6, dtype=torch.int64), (2, 3))
    with pytest.raises(ValueError, match="one for each patch"):
        draw_merged_regions(image, torch.zeros(50, dtype=torch.int64), (5, 10))
