"""The order is a permutation, a function of (seed, epoch) alone, and even."""

from __future__ import annotations

import numpy as np
import pytest

from pairtile.engine.data import batch_indices, batch_order
from pairtile.engine.data.order import AUGMENT_STREAM, CAPTION_STREAM, permute, rank_slice, sample_seeds


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_is_a_permutation(n: int) -> None:
    for epoch in range(3):
        assert sorted(permute(np.arange(n), n, 0, epoch).tolist()) == list(range(n))


def test_batches_are_rows_of_the_epoch_and_start_anywhere() -> None:
    order = batch_order(103, 10, seed=5, epoch=2)
    assert order.shape == (10, 10)
    for row in (0, 3, 9):
        epoch, indices = batch_indices(103, 10, 5, 2 * 10 + row)
        assert epoch == 2
        assert indices.tolist() == order[row].tolist()


def test_seed_and_epoch_change_the_order() -> None:
    orders = {tuple(batch_order(64, 64, seed, epoch)[0]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_is_fixed_for_good() -> None:
    # Runs are resumed by later versions: these numbers must never change.
    assert permute(np.arange(6), 6, 0).tolist() == [4, 5, 1, 0, 3, 2]


@pytest.mark.parametrize("n", [7, 50, 1000])
def test_every_sample_is_as_likely_in_every_place(n: int) -> None:
    epochs, bins = 1000, 7
    counts = np.zeros((bins, bins))
    for epoch in range(epochs):
        place = permute(np.arange(n), n, 3, epoch)
        np.add.at(counts, (np.arange(n) * bins // n, place * bins // n), 1)
    width = np.bincount(np.arange(n) * bins // n)
    expected = np.outer(width, width) * epochs / n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 36 + 5 * np.sqrt(2 * 36)  # 36 degrees of freedom, five standard deviations


def test_neighbours_are_separated() -> None:
    place = permute(np.arange(20000), 20000, 0)
    assert abs(np.corrcoef(place[:-1], place[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(place, np.arange(20000))[0, 1]) < 0.03


def test_a_batch_of_a_huge_data_set_costs_nothing() -> None:
    _, indices = batch_indices(10**12, 512, 0, 12345)
    assert len(set(indices.tolist())) == 512
    assert indices.max() < 10**12


def test_seeds_depend_on_all_their_arguments() -> None:
    index = np.arange(4)
    seeds = [
        sample_seeds(0, 0, index, CAPTION_STREAM),
        sample_seeds(0, 0, index, AUGMENT_STREAM),
        sample_seeds(0, 1, index, CAPTION_STREAM),
        sample_seeds(1, 0, index, CAPTION_STREAM),
    ]
    assert len({int(s) for row in seeds for s in row}) == 16
    assert sample_seeds(0, 0, index[2:], CAPTION_STREAM).tolist() == seeds[0][2:].tolist()


def test_rank_slices_cover_everything_once() -> None:
    for count in (0, 1, 5, 8):
        rows = [i for rank in range(4) for i in range(count)[rank_slice(count, rank, 4)]]
        assert rows == list(range(count))
