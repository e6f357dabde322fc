"""Which caption is chosen, and what choices a recipe may state."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from pairtile.engine.data import BadSample, Caption, CaptionChoice, choose_caption, filter_captions
from pairtile.engine.data.order import CAPTION_STREAM, sample_seeds

CAPTIONS = [Caption("dog", "en"), Caption("Hund", "de"), Caption("hound", "en"), Caption("chien", "fr")]
DRAWS = sample_seeds(0, 0, np.arange(4000), CAPTION_STREAM).tolist()


def chosen(**fields: object) -> Counter[str]:
    choice = CaptionChoice.model_validate(fields)
    captions = filter_captions(CAPTIONS, choice)
    return Counter(choose_caption(captions, choice, draw).text for draw in DRAWS)


def test_first() -> None:
    assert set(chosen()) == {"dog"}
    assert set(chosen(tags=["fr", "en"])) == {"chien"}


def test_random_is_even() -> None:
    counts = chosen(choice="random")
    assert set(counts) == {"dog", "Hund", "hound", "chien"}
    assert all(abs(count - 1000) < 150 for count in counts.values())
    assert set(chosen(choice="random", tags=["en"])) == {"dog", "hound"}


def test_weights_are_of_tags() -> None:
    counts = chosen(choice="weighted", tags={"en": 3, "de": 1})
    assert set(counts) == {"dog", "Hund", "hound"}
    assert abs(counts["Hund"] - 1000) < 150
    assert abs(counts["dog"] - counts["hound"]) < 250


def test_no_wanted_tag() -> None:
    with pytest.raises(BadSample, match="no caption with a wanted tag"):
        filter_captions(CAPTIONS, CaptionChoice(tags=["ja"]))


@pytest.mark.parametrize(
    "fields",
    [
        {"choice": "weighted"},
        {"choice": "weighted", "tags": ["en"]},
        {"tags": {"en": 0}},
        {"tags": []},
        {"chioce": "first"},
    ],
)
def test_wrong_choices_are_refused(fields: dict) -> None:
    with pytest.raises(ValidationError):
        CaptionChoice.model_validate(fields)
