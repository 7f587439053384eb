"""Which script a text is written in: to send English to its own tower, and to choose templates for names."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Sequence

from trimtab.data.templates import DEFAULT_TEMPLATES

BARE_NAME = "{}"
# How Unicode's names of letters begin that English has: the okina and one of the apostrophes are modifiers.
_NO_SCRIPT = ("LATIN", "MODIFIER LETTER")
_MICRO = "µ"  # the sign in "10 µm" is of no script either; NFKC makes a Greek letter of it


@functools.lru_cache(maxsize=65536)
def _is_foreign(character: str) -> bool:
    # NFKC writes full-width letters, ligatures and signs such as "º" in plain letters.
    plain = unicodedata.normalize("NFKC", character.replace(_MICRO, ""))
    return any(letter.isalpha() and not unicodedata.name(letter, "LATIN").startswith(_NO_SCRIPT) for letter in plain)


def is_latin(text: str) -> bool:
    """Whether every letter of a text is Latin; so is a text without letters."""
    return text.isascii() or not any(map(_is_foreign, text))


def default_templates(names: Sequence[str]) -> tuple[str, list[str]]:
    """Templates for class names by their script: English ones for Latin, Chinese for Han, else the bare name.

    The script of most names decides, so that "T恤" and "iPod" may stand in a Chinese list. Where any name has
    kana, names in Han count as Japanese.

    Returns:
        whom they are for ("en", "zh" or "bare name"), and the templates.
    """
    japanese = any(map(_is_kana, "".join(names)))
    votes: Counter[str] = Counter()
    for name in names:
        if is_latin(name):
            votes["en"] += 1
        else:
            han = all(_is_han(letter) or is_latin(letter) for letter in name)
            votes["zh" if han and not japanese else "bare name"] += 1
    most = votes.most_common(1)[0][0] if votes else "bare name"
    return most, list(DEFAULT_TEMPLATES.get(most, [BARE_NAME]))


def default_context(names: Sequence[str]) -> str:
    """What stands before the name in the first default template that ends with it; the English one where none does."""
    _, templates = default_templates(names)
    ends = [template for template in (*templates, *DEFAULT_TEMPLATES["en"]) if template.endswith(BARE_NAME)]
    return next(start for end in ends if (start := end.removesuffix(BARE_NAME).strip()))


def _is_han(letter: str) -> bool:
    return "\u3400" <= letter <= "\u9fff" or "\uf900" <= letter <= "\ufaff" or letter >= "\U00020000"


def _is_kana(letter: str) -> bool:
    # Not the middle dot and the long-vowel mark at the end of the block, which Chinese text has too.
    return "\u3041" <= letter <= "\u30fa" or "\uff66" <= letter <= "\uff9d"
