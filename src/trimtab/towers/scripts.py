"""Which script a text is written in, to send English to the tower that was trained on it."""

from __future__ import annotations

import functools
import unicodedata


@functools.lru_cache(maxsize=65536)
def _is_foreign(character: str) -> bool:
    # NFKC writes full-width letters, ligatures and signs such as "º" in plain letters.
    plain = unicodedata.normalize("NFKC", character)
    return any(letter.isalpha() and not unicodedata.name(letter, "LATIN").startswith("LATIN") for letter in plain)


def is_latin(text: str) -> bool:
    """Whether every letter of a text is Latin; so is a text without letters."""
    return text.isascii() or not any(map(_is_foreign, text))
