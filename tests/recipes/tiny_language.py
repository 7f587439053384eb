"""A toy language between tiny random models: fifteen Chinese words whose English a random CLIP tells apart.

As a script it runs a recipe and may kill itself on the way: ``python tiny_language.py RECIPE.yaml [WHERE COUNT]``,
WHERE being ``step``, ``teacher`` or ``student`` (chunks of texts passed through that tower).
"""

from __future__ import annotations

import random

# Every character is in the vocabulary of the tiny student.
ADJECTIVES = {"红": "red", "黄": "yellow", "蓝": "blue", "黑": "black", "绿": "green", "小": "small", "旧": "old"}
NOUNS = {"猫": "cat", "狗": "dog", "鸟": "bird", "花": "flower", "茶": "tea", "椅": "chair", "房": "house", "车": "car"}
COUNTS = {"一": "one", "两": "two"}


def toy_pairs(limit: int = 400, seed: int = 0) -> list[tuple[str, str]]:
    """Different pairs (target, English): a noun, one or two adjectives before it, a count before them or none."""
    pairs = set()
    for noun in NOUNS.items():
        for first in [("", ""), *ADJECTIVES.items()]:
            for second in [("", ""), *ADJECTIVES.items()]:
                for count in [("", ""), *COUNTS.items()]:
                    if first == second and first[0]:
                        continue
                    words = (count, first, second, noun)
                    pairs.add(("".join(w[0] for w in words), " ".join(w[1] for w in words if w[1])))
    return random.Random(seed).sample(sorted(pairs), limit)
