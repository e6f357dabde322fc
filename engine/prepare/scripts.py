"""Which script or group of symbols a character belongs to, for zero-shot classification."""

from __future__ import annotations

from bisect import bisect_right

# First words of Unicode names that are the names of scripts. Longer names come first.
_BY_NAME = (
    "CANADIAN SYLLABICS", "OLD ITALIC", "LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "ARABIC", "GEORGIAN",
    "COPTIC", "TIFINAGH", "OGHAM", "LAO", "NKO", "LISU", "CJK", "BRAILLE PATTERN", "HEXAGRAM", "BOX DRAWINGS",
    "DOMINO TILE", "PLAYING CARD", "COMBINING", "MODIFIER LETTER", "VULGAR FRACTION", "ROMAN NUMERAL",
    "SMALL ROMAN NUMERAL", "SUPERSCRIPT", "SUBSCRIPT", "CIRCLED", "NEGATIVE CIRCLED", "DINGBAT",
)  # fmt: skip
_RENAMED = {
    "BRAILLE PATTERN": "braille", "BOX DRAWINGS": "box drawing", "COMBINING": "combining mark",
    "SMALL ROMAN NUMERAL": "roman numeral", "NEGATIVE CIRCLED": "circled", "DINGBAT": "circled",
    "CJK": "cjk", "NKO": "n'ko",
}  # fmt: skip

# Otherwise by Unicode block: (first code point, group), up to the next row.
_BY_BLOCK = (
    (0x0000, "punctuation"), (0x0030, "digit"), (0x003A, "punctuation"), (0x02B0, "modifier letter"),
    (0x0300, "combining mark"), (0x0370, "punctuation"), (0x2070, "superscript"), (0x20A0, "currency"),
    (0x20D0, "combining mark"), (0x2100, "letterlike symbol"), (0x2150, "number form"), (0x2190, "arrows"),
    (0x2200, "mathematical operators"), (0x2300, "technical symbol"), (0x2460, "circled"), (0x2500, "box drawing"),
    (0x2580, "block element"), (0x25A0, "geometric shape"), (0x2600, "pictograph"), (0x27C0, "mathematical operators"),
    (0x27F0, "arrows"), (0x2800, "braille"), (0x2900, "arrows"), (0x2980, "mathematical operators"),
    (0x2B00, "arrows"), (0x2B12, "geometric shape"), (0x2C60, "other"), (0x2E00, "punctuation"), (0x2E80, "other"),
    (0xA700, "modifier letter"), (0xA722, "other"),
)  # fmt: skip
_STARTS = [start for start, _ in _BY_BLOCK]


def script_of(code: int, name: str) -> str:
    """Lower-case script ("latin", "greek", ...) or group of symbols ("arrows", ...) of a character.

    >>> script_of(0x3B1, "GREEK SMALL LETTER ALPHA"), script_of(0x2190, "LEFTWARDS ARROW")
    ('greek', 'arrows')
    """
    for words in _BY_NAME:
        if name.startswith(words + " "):
            return _RENAMED.get(words, words.lower())
    return _BY_BLOCK[bisect_right(_STARTS, code) - 1][1]
