"""Which caption a step reads."""

from __future__ import annotations

from collections.abc import Sequence

from .config import CaptionChoice
from .schema import BadSample, Caption, Reason


def filter_captions(captions: list[Caption], choice: CaptionChoice) -> list[Caption]:
    """The captions whose tag is wanted, in the order of ``choice.tags``; all of them without tags.

    Raises:
        BadSample: the sample has captions, but none with a wanted tag.
    """
    if choice.tags is None:
        return captions
    wanted = [caption for tag in choice.tags for caption in captions if caption.tag == tag]
    if not wanted:
        have = sorted({caption.tag for caption in captions})
        raise BadSample(Reason.NO_WANTED_CAPTION, f"has {have}, wanted {list(choice.tags)}")
    return wanted


def choose_caption(captions: Sequence[Caption], choice: CaptionChoice, seed: int) -> Caption:
    """One of the filtered captions; ``seed`` (64 random bits) decides, so equal seeds choose alike."""
    if choice.choice == "first" or len(captions) == 1:
        return captions[0]
    if choice.choice == "random" or not isinstance(choice.tags, dict):
        return captions[seed % len(captions)]
    weights = {tag: choice.tags[tag] for tag in dict.fromkeys(caption.tag for caption in captions)}
    point = (seed >> 32) / (1 << 32) * sum(weights.values())
    drawn = next(iter(weights))
    for tag, weight in weights.items():
        drawn = tag
        point -= weight
        if point < 0:
            break
    of_tag = [caption for caption in captions if caption.tag == drawn]
    return of_tag[(seed & 0xFFFFFFFF) % len(of_tag)]
