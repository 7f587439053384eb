"""Scripts: which one a text is written in, to send English to its own tower and to choose templates for names; and one
form of letters that Unicode can write in several ways.

`trimtab export` copies this file into its loader, so it imports the standard library alone.
"""

from __future__ import annotations

import functools
import re
import unicodedata

# How Unicode's names of letters begin that English has: the okina and one of the apostrophes are modifiers.
_NO_SCRIPT = ("LATIN", "MODIFIER LETTER")
_MICRO = "µ"  # the sign in "10 µm" is of no script either; NFKC makes a Greek letter of it
_TATWEEL = "\u0640"  # stretches a line of Arabic, and is no letter
_HALF_WIDTH_KANA = re.compile("[\uff65-\uff9f]+")


def normal_form(text: str) -> str:
    """A text as towers read it: letters composed (NFC), kana in full width, no tatweel.

    Tokenizers that do not do so themselves read the parts of a decomposed Hangul or accented letter as noise.
    """
    if text.isascii():
        return text
    text = _HALF_WIDTH_KANA.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text.replace(_TATWEEL, ""))
    return unicodedata.normalize("NFC", text)


@functools.lru_cache(maxsize=65536)
def _is_foreign(character: str) -> bool:
    # NFKC writes full-width letters, ligatures and signs such as "º" in plain letters.
    plain = unicodedata.normalize("NFKC", character.replace(_MICRO, ""))
    return any(letter.isalpha() and not unicodedata.name(letter, "LATIN").startswith(_NO_SCRIPT) for letter in plain)


def is_latin(text: str) -> bool:
    """Whether every letter of a text is Latin; so is a text without letters."""
    return text.isascii() or not any(map(_is_foreign, text))


def is_han(letter: str) -> bool:
    """Whether a letter is Chinese, as kanji are too."""
    return "\u3400" <= letter <= "\u9fff" or "\uf900" <= letter <= "\ufaff" or letter >= "\U00020000"


def is_kana(letter: str) -> bool:
    """Whether a letter is Japanese alone."""
    # Not the middle dot and the long-vowel mark at the end of the block, which Chinese text has too.
    return "\u3041" <= letter <= "\u30fa" or "\uff66" <= letter <= "\uff9d"


def is_east_asian(letter: str) -> bool:
    """Whether a character is Han, kana, Hangul or one of their marks."""
    return letter >= "\u1100" and unicodedata.east_asian_width(letter) in "WF"
