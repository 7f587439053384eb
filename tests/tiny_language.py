"""A toy language link: phrases of seventeen words between tiny random models, small enough to learn in a second.

As a script it adapts a recipe, and may send itself a signal on the way:
``python tiny_language.py RECIPE.yaml [step|student|teacher COUNT SIGKILL|SIGINT]``, where COUNT is of training
steps or of chunks of texts passed through that tower.
"""

from __future__ import annotations

import csv
import functools
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from trimtab.config import LanguageRecipe, recipe_from_mapping

CHUNK = 64  # texts per chunk of the cache, so that a few hundred texts make several

# Every character and every word is in the vocabulary of the tiny BERT.
ADJECTIVES = {"红": "red", "黄": "yellow", "蓝": "blue", "黑": "black", "绿": "green", "小": "small", "旧": "old"}
NOUNS = {"猫": "cat", "狗": "dog", "鸟": "bird", "花": "flower", "茶": "tea", "椅": "chair", "房": "house", "车": "car"}
COUNTS = {"一": "one", "两": "two"}


def toy_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different pairs (target, English): a noun after one or two adjectives or none, a count before them or none."""
    none = ("", "")
    pairs = []
    for number in [none, *COUNTS.items()]:
        for first in [none, *ADJECTIVES.items()]:
            for second in ADJECTIVES.items():
                for noun in NOUNS.items():
                    if first != second:
                        words = (number, first, second, noun)
                        pairs.append(("".join(w[0] for w in words), " ".join(w[1] for w in words if w[1])))
    return random.Random(seed).sample(pairs, count)


def write_pairs(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("target", "english")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`one` with the values of `other`, mappings within mappings included."""
    deep = {k: merged(one[k], v) for k, v in other.items() if isinstance(v, dict) and isinstance(one.get(k), dict)}
    return {**one, **other, **deep}


def toy_mapping(base: Path, student: Path, pairs: Path, out: Path) -> dict[str, Any]:
    """A recipe that learns the toy language in a second, as it would stand in a YAML file."""
    return {
        "link": "language",
        "base": str(base),
        "student": {"name": str(student), "layers": [0, -1]},
        "out": str(out),
        "data": {"train": [str(pairs)], "validation_size": 50, "english_share": 0.0},
        "adapter": {"width": 32, "heads": 2},
        "training": {"epochs": 10, "batch_size": 32, "learning_rate": 5e-3, "trackers": []},
    }


def toy_recipe(*places: Path, **changes: Any) -> LanguageRecipe:
    return recipe_from_mapping(merged(toy_mapping(*places), changes), "toy")


def in_small_chunks(patch: Callable[[str, Any], None]) -> None:
    """Have the caches filled `CHUNK` texts at a time; `patch` sets an attribute by its dotted name."""
    from trimtab.data import cache

    patch("trimtab.recipes.language.cached_states", functools.partial(cache.cached_states, chunk=CHUNK))
    patch("trimtab.recipes.language.cached_vectors", functools.partial(cache.cached_vectors, chunk=CHUNK))


def recipe_writer(path: Path, mapping: dict[str, Any]) -> Callable[..., Path]:
    """A function that writes the mapping with changes as YAML; returns the file."""

    def write(**changes: Any) -> Path:
        path.write_text(yaml.safe_dump(merged(mapping, changes)), encoding="utf-8")
        return path

    return write


def never(patch: Callable[[Any, str, Any], None], owner: Any, name: str, happened: str) -> None:
    """Have a call of a function fail."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError(happened)

    patch(owner, name, refuse)


def signal_at(where: str, count: int, number: int, patch: Callable[[str, Any], None]) -> None:
    """Send this process a signal at the start of training step or of chunk `count`."""
    from trimtab.tasks.language import LanguageTask
    from trimtab.towers.dual_encoder import DualEncoder
    from trimtab.towers.text_encoder import TextEncoder

    owner, name = {
        "step": (LanguageTask, "step"),
        "student": (TextEncoder, "token_states"),
        "teacher": (DualEncoder, "encode_text"),
    }[where]
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    patch(f"{owner.__module__}.{owner.__name__}.{name}", counted)


def set_dotted(dotted: str, value: Any) -> None:
    """As pytest's monkeypatch does, without undoing it."""
    from pkgutil import resolve_name

    owner, _, name = dotted.rpartition(".")
    setattr(resolve_name(owner), name, value)


if __name__ == "__main__":
    path, *when = sys.argv[1:]
    in_small_chunks(set_dotted)
    if when:
        signal_at(when[0], int(when[1]), getattr(signal, when[2]), set_dotted)
    sys.argv[1:] = ["adapt", path]
    from trimtab.cli import main

    main()
