"""Key columns and the ceiling against direct readings of their definitions."""

import itertools
import math

import pytest
import torch

from pairtile.engine.evaluate import id_ceiling, match_keys
from pairtile.engine.evaluate.equivalence import ambiguous_keys


def test_keys_within_one_id_are_dropped() -> None:
    keys, ids = torch.tensor([5, 5, 9, 9, -1, 3]), torch.tensor([0, 0, 1, 2, 2, 4])
    assert ambiguous_keys(keys, ids).tolist() == [-1, -1, 9, 9, -1, -1]


@pytest.mark.parametrize("seed", range(5))
def test_match_keys_say_what_the_definition_says(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, texts = 25, 14
    text_ids = torch.randint(0, 8, (texts,), generator=generator)
    owner_image = torch.arange(images)
    owner_text = torch.randint(0, texts, (images,), generator=generator)
    image_ids = text_ids[owner_text]
    drawings = torch.randint(-1, 9, (images,), generator=generator)
    image_keys, text_keys = match_keys(image_ids, text_ids, [drawings], owner_text, owner_image)
    assert image_keys.shape[1] == text_keys.shape[1]
    for text, image in itertools.product(range(texts), range(images)):
        described = [i for i in range(images) if owner_text[i] == text]
        same_drawing = any(drawings[i] == drawings[image] != -1 for i in described)
        expected = bool(text_ids[text] == image_ids[image]) or same_drawing
        agree = (image_keys[image] == text_keys[text]) & (text_keys[text] != -1)
        assert bool(agree.any()) == expected


def test_no_equivalences_leave_the_id_alone() -> None:
    ids = torch.tensor([4, 4, 2])
    owners = torch.tensor([0, 1, 2])
    for equivalences in ([], [torch.tensor([-1, -1, -1])]):
        image_keys, text_keys = match_keys(ids, ids, equivalences, owners, owners)
        assert image_keys.tolist() == text_keys.tolist() == [[4], [4], [2]]


def test_ceiling_of_single_images() -> None:
    """Groups of 1, 2 and 3 ids: each group is right once, so 3 of 6 queries."""
    ids = torch.arange(6)
    ceiling = id_ceiling(ids, torch.tensor([-1, 10, 10, 20, 20, 20]), ids)
    assert ceiling.image_to_text == pytest.approx(3 / 6)
    assert ceiling.text_to_image == pytest.approx(3 / 6)


def test_ceiling_with_several_images_per_id() -> None:
    # Id 0 has a drawing of its own beside a shared one; id 1 has only the shared one, twice; id 2 is not there.
    ids, drawings = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 2, 2])
    ceiling = id_ceiling(ids, drawings, torch.tensor([0, 1, 2]))
    assert ceiling.image_to_text == pytest.approx(3 / 4)  # the shared group is called "1" by the best model
    assert ceiling.text_to_image == pytest.approx((1 + 2 / 3) / 2)


def test_images_without_a_caption_ask_nothing() -> None:
    ceiling = id_ceiling(torch.tensor([0, 1, 2, 3]), torch.tensor([5, 5, 5, -1]), torch.tensor([0, 1]))
    assert ceiling.image_to_text == pytest.approx(1 / 2)
    assert ceiling.text_to_image == pytest.approx(1 / 3)


def test_ceiling_without_shared_drawings_is_one() -> None:
    ids = torch.tensor([3, 1, 8])
    for drawings in (torch.tensor([-1, -1, -1]), torch.tensor([5, -1, 0])):
        ceiling = id_ceiling(ids, drawings, ids)
        assert (ceiling.image_to_text, ceiling.text_to_image) == (1, 1)


def test_ceiling_of_nothing_is_undefined() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert math.isnan(id_ceiling(empty, empty, empty).image_to_text)
