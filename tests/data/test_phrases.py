from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data import phrases as module
from trimtab.data.phrases import GRAMMARS, Grammar, article, phrases, plural
from trimtab.errors import RecipeError

NOUNS = [("苹果", "apple"), ("猫", "cat"), ("盒子", "box"), ("老鼠", "mouse")]


@pytest.mark.parametrize(
    ("phrase", "expected"), [("apple", "an apple"), ("red apple", "a red apple"), ("Owl", "an Owl")]
)
def test_articles(phrase: str, expected: str) -> None:
    assert article(phrase) == expected


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        *(("cat", "cats"), ("box", "boxes"), ("glass", "glasses"), ("church", "churches"), ("brush", "brushes")),
        *(("cherry", "cherries"), ("toy", "toys"), ("scissors", "scissors"), ("ice cream", "ice creams")),
    ],
)
def test_plurals(noun: str, expected: str) -> None:
    assert plural(noun) == expected


@given(st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_phrases_depend_on_the_seed_alone(count: int, seed: int) -> None:
    pairs = list(phrases(NOUNS, "zh", count, seed))
    assert len(pairs) == count
    assert pairs == list(phrases(NOUNS, "zh", count, seed))
    assert pairs[: count // 2] == list(phrases(NOUNS, "zh", count // 2, seed))
    for target, english in pairs:
        assert not re.search(r"[{}]", target + english)
        assert re.search(r"[㐀-鿿]", target)
        assert re.search(r"[a-zA-Z]", english)
        # One noun at least is on both sides.
        assert any(chinese in target and name[:3] in english.lower() for chinese, name in NOUNS)
        assert english[0].isupper() == english.endswith((".", "!")) == target.endswith(("。", "！"))


@given(st.integers(1, 9), st.integers(0, 50), st.integers(0, 9))
def test_every_noun_comes_equally_often(nouns: int, count: int, seed: int) -> None:
    plain = Grammar((("{n}", "{n}"),), (("", ""),), (("", ""),), (("", ""),), (("", ""),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.GRAMMARS, "plain", plain)
        pairs = list(phrases([(f"目{i}", f"noun {i}") for i in range(nouns)], "plain", count, seed))
    times = Counter({f"noun {i}": 0 for i in range(nouns)})
    times.update(english for _, english in pairs)
    assert max(times.values()) - min(times.values()) <= 1
    assert all(target[1:] == english.split()[1] for target, english in pairs)


def test_nothing_out_of_nothing() -> None:
    assert list(phrases([], "zh", 5, 0)) == []
    assert list(phrases(NOUNS, "zh", 0, 0)) == []


def test_other_languages_are_told() -> None:
    with pytest.raises(RecipeError, match=r"no phrase patterns for language 'fr'; there are some for \['zh'\]"):
        list(phrases(NOUNS, "fr", 1, 0))


@pytest.mark.parametrize("language", sorted(GRAMMARS))
def test_both_sides_of_a_pattern_have_the_same_slots(language: str) -> None:
    grammar = GRAMMARS[language]
    english_slots = {"n": "n", "ns": "n", "a": "n", "b": "m", "q": "q", "q:a": "q", "c": "c", "p": "p"}
    for english, target in grammar.patterns:
        there = Counter(english_slots[slot] for slot in re.findall(r"{(.*?)}", english))
        assert there == Counter(re.findall(r"{(.*?)}", target)), (english, target)
    assert len(set(grammar.patterns)) == len(grammar.patterns)
    for pairs in (grammar.qualities, grammar.counts, grammar.places):
        assert len(set(pairs)) == len(pairs)
        assert all(itertools.chain.from_iterable(pairs))
