from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_language import toy_pairs, write_pairs
from trimtab.config import LanguageRecipe, TextSource, recipe_from_mapping
from trimtab.data import corpora
from trimtab.data.parallel import ParallelText, clean
from trimtab.data.templates import DEFAULT_TEMPLATES
from trimtab.errors import DataError, RecipeError
from trimtab.recipes import sources
from trimtab.recipes.sources import PREPARED, drawing_probability, prepare, read_source

NOUNS = [("猫", "cat"), ("狗", "dog"), ("鸟", "bird"), ("椅子", "chair"), ("茶", "tea"), ("花", "flower")]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., LanguageRecipe]:
    """A recipe over `pairs.csv`, made of `rows`; other arguments go to its `data`."""

    def make(rows: Any = None, *, seed: int = 0, **data: Any) -> LanguageRecipe:
        write_pairs(tmp_path / "pairs.csv", toy_pairs(200) if rows is None else rows)
        settings = {"train": [str(tmp_path / "pairs.csv")], "validation_size": 20, "english_share": 0.0, **data}
        return recipe_from_mapping({"link": "language", "seed": seed, "data": settings}, "test")

    return make


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stand-ins for what packages carry: nothing is fetched."""
    monkeypatch.setattr(corpora, "concrete_nouns", lambda: frozenset(english for _, english in NOUNS))

    def hold(**sources: list[tuple[str, str, float]]) -> None:
        for name, rows in sources.items():
            monkeypatch.setitem(PREPARED, name, lambda _, rows=rows: iter(rows))

    return hold


def plain(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def sides(text: ParallelText) -> tuple[set[str], set[str]]:
    return {plain(target) for target in text.targets}, {plain(english) for english in text.english}


# Reading


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("cedcit", "did you mean 'cedict'?"),
        ("CLDR:ja", "did you mean 'cldr'?"),
        ("imagenet", "did you mean 'imagenet21k'?"),
        ("pairs.txt", "neither a file (.csv, .tsv, .jsonl, .parquet) nor one of the prepared sources cedict, cldr"),
        ("cldr", "cldr needs a locale, for example cldr:ja"),
        ("cataclysm:", "cataclysm needs a locale, for example cataclysm:zh_CN"),
        ("cedict:ja", "cedict has none: write cedict"),
    ],
)
def test_names_that_are_no_source(path: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_source(TextSource(path))
    assert repr(path) in str(caught.value)
    assert expected in str(caught.value)


def test_prepared_sources_bring_weights_and_their_language(packages: Callable[..., None]) -> None:
    packages(
        cedict=[("猫", "cat", 3.0), ("在", "at", 0.5)],
        cldr=[("犬", "dog", 3.0)],
    )
    text = read_source(TextSource("cedict", weight=2.0))
    assert (text.targets, text.english, text.languages) == (["猫", "在"], ["cat", "at"], ["zh", "zh"])
    assert text.weights.tolist() == [6.0, 1.0]
    assert read_source(TextSource("cldr:ja")).languages == ["ja"]
    assert read_source(TextSource("cldr:zh_Hant")).languages == ["zh"]


def test_english_names_are_pairs_with_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "imagenet21k_texts", lambda: iter([("tabby cat", 1.0), ("tabby, a striped cat", 0.5)]))
    text = read_source(TextSource("imagenet21k"))
    assert text.targets == text.english == ["tabby cat", "tabby, a striped cat"]
    assert set(text.languages) == {"en"}


def test_limit_takes_the_heaviest_in_their_order(packages: Callable[..., None]) -> None:
    packages(cedict=[(str(i), str(i), 3.0 if i % 10 == 5 else 1.0) for i in range(100)])
    text = read_source(TextSource("cedict", limit=20))
    assert len(text) == 20
    assert {str(i) for i in range(100) if i % 10 == 5} <= set(text.targets)
    assert text.targets == sorted(text.targets, key=int)
    assert text.targets == read_source(TextSource("cedict", limit=20)).targets
    assert len(read_source(TextSource("cedict", limit=1000))) == 100


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"target,english\n", "has no rows"),
        (b"zh,en\n\xe7\x8c\xab,cat\n", "has no column 'target', 'english'; columns found: zh, en"),
        ("target,english\n花园里的小猫,cat\n".encode("gb18030"), "iconv -f GB18030"),
        ("target,english,weight\n猫,cat,much\n".encode(), "row 2: weight 'much' is not a positive number"),
    ],
)
def test_files_that_cannot_be_used(content: bytes | None, expected: str, recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    if content is not None:
        path.write_bytes(content)
    for key in ("train", "validation"):
        with pytest.raises(DataError) as caught:
            prepare(recipe(**{key: [str(path)]}))
        assert str(path) in str(caught.value)
        assert expected in str(caught.value)


# Cleaning


def test_what_is_dropped_is_counted(recipe: Any, tmp_path: Path) -> None:
    rows = [
        *toy_pairs(100),
        *toy_pairs(10),  # repeats
        *[("", "nothing"), ("虚无", " "), ("\u200b", "invisible")],
        *[("长" * 301, "long " * 40), ("短", "a" * 120)],
    ]
    text = prepare(recipe(rows))
    path = str(tmp_path / "pairs.csv")
    assert text.counts[path] == {
        **{"kept": 100, "empty": 3, "too_short": 0, "too_long": 1, "length_ratio": 1, "identical": 0},
        "duplicate": 10,
    }
    assert text.counts["all sources"]["kept"] == 100
    assert text.counts["excluded as test texts"] == {"kept": 100, "dropped": 0}
    assert len(text.train) + len(text.validation) == 100


def test_pairs_that_stand_in_two_sources_are_counted_once(recipe: Any, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other.csv", toy_pairs(200)[:50])
    text = prepare(recipe(train=[str(tmp_path / "pairs.csv"), str(other)]))
    assert text.counts[str(other)]["kept"] == 50
    assert text.counts["all sources"] == {**text.counts["all sources"], "kept": 200, "duplicate": 50}


def test_a_source_alone_is_cleaned_once(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, calls = recipe([*toy_pairs(200), ("", "cat"), toy_pairs(200)[0]]), []
    monkeypatch.setattr(sources, "clean", lambda *args, **options: calls.append(1) or clean(*args, **options))
    monkeypatch.setattr(sources, "_normal", None)
    text = sources._read_all(asked.data.train, asked.data, counts := {})
    kept, dropped = sources._exclude(text, ())
    assert len(calls) == 1
    assert counts["all sources"] == {**counts[asked.data.train[0].path], "empty": 0, "duplicate": 0}
    assert counts["all sources"] == clean(text)[1].as_dict(), "as to clean it again would give"
    assert (kept.digest, dropped) == (clean(text)[0].digest, {"kept": 200, "dropped": 0})


def test_nothing_left_names_the_file_and_the_rule(recipe: Any, tmp_path: Path) -> None:
    empty = write_pairs(tmp_path / "empty.csv", [("", "cat"), ("猫", "")])
    with pytest.raises(DataError, match=r"empty\.csv: no pair is left of 2 after cleaning \(empty 2\)"):
        prepare(recipe(train=[str(tmp_path / "pairs.csv"), str(empty)]))


def test_a_column_for_each_language_of_one_file(recipe: Any, tmp_path: Path) -> None:
    rows = [(target, target + "・", english) for target, english in toy_pairs(100)]
    path = str(write_pairs(tmp_path / "three.csv", rows, ("zh", "ja", "english")))
    sources = [{"path": path, "target": code, "language": code} for code in ("zh", "ja")]
    text = prepare(recipe(train=sources))
    assert text.counts[path]["kept"] == text.counts[f"{path} (ja, ja)"]["kept"] == 100
    counts = text.train.language_counts()
    assert counts["zh"] == counts["ja"] > 80
    # A sentence in two languages has one English side, so both go to the same part.
    assert not sides(text.train)[1] & sides(text.validation)[1]


def test_a_language_is_one_however_its_tag_is_written(tmp_path: Path) -> None:
    tags = ["zh", "ZH", "zh_cn", "zh-CN", "ZH-hans-cn", "en-US", "EN"]
    rows = "".join(f"目标{number},target {number},{tag}\n" for number, tag in enumerate(tags))
    (tmp_path / "pairs.csv").write_text(f"target,english,language\n{rows}", encoding="utf-8")
    read = read_source(TextSource(str(tmp_path / "pairs.csv")))
    assert read.languages == ["zh", "zh", "zh-CN", "zh-CN", "zh-Hans-CN", "en", "en"]


def test_only_english_is_refused(recipe: Any, packages: Callable[..., None]) -> None:
    packages(imagenet21k=[(english, english, 1.0) for _, english in toy_pairs(100)])
    with pytest.raises(DataError, match="all 100 training pairs are English-English"):
        prepare(recipe(train=["imagenet21k"]))


# Test texts


def test_test_texts_stay_out_in_every_spelling(recipe: Any, tmp_path: Path, packages: Callable[..., None]) -> None:
    packages()
    tests = ["小猫", "一只红狗", "green tea", "Tabby", "ＡＢＣ"]
    rows = [
        *toy_pairs(100),
        *[("小 猫。", "kitten"), ("“一只，红狗”！", "a red dog"), ("TABBY?", "a tabby"), ("abc", "letters")],
        *[("小猫们", "kittens"), ("绿茶", "green tea"), *NOUNS],
    ]
    exclude = write_pairs(tmp_path / "test.csv", [("1.png", text) for text in tests], ("image", "text"))
    text = prepare(recipe(rows, exclude=[str(exclude)], english_share=0.4, phrases=300))
    dropped = {plain(t) for t in tests[:4]} | {"abc"}
    assert not dropped & sides(text.train)[0]
    assert not dropped & sides(text.validation)[0]
    kept = set(text.train.targets) | set(text.validation.targets)
    assert {"小猫们", "绿茶"} <= kept
    # Of the rows the four spelt otherwise, and the toy language's own 小猫 if it is there.
    own = sum(target in tests for target, _ in toy_pairs(100))
    assert text.counts["excluded as test texts"]["dropped"] == 4 + own


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=3), st.sampled_from([*" \n\u3000\u200d\ufe0f\u0308。.!?-_Ａİßaﬁ狗١½$"]))))
def test_texts_are_compared_without_case_width_blanks_and_punctuation(parts: list[str]) -> None:
    text = "".join(parts)
    folded = unicodedata.normalize("NFKC", text).casefold()
    seen = "".join(c for c in folded if unicodedata.category(c)[0] not in "PZC")
    assert sources._normal(text) == (seen or folded), "punctuation alone stays what it is"


def test_excluding_everything_is_an_error(recipe: Any, tmp_path: Path) -> None:
    exclude = write_pairs(tmp_path / "test.csv", [(target,) for target, _ in toy_pairs(200)], ("text",))
    with pytest.raises(DataError, match=r"no pair is left to train on: data\.exclude"):
        prepare(recipe(exclude=[str(exclude)]))


def test_a_null_among_test_texts_excludes_nothing(recipe: Any, tmp_path: Path) -> None:
    exclude = tmp_path / "test.jsonl"
    exclude.write_text(f'{{"text": null}}\n{{"text": "{toy_pairs(200)[0][0]}"}}\n', encoding="utf-8")
    assert prepare(recipe(exclude=[str(exclude)])).counts["excluded as test texts"]["dropped"] == 1


def test_exclude_needs_a_text_column(recipe: Any, tmp_path: Path) -> None:
    exclude = write_pairs(tmp_path / "test.csv", [("小猫",)], ("caption",))
    with pytest.raises(DataError, match=r"test\.csv: has no column 'text'; columns found: caption"):
        prepare(recipe(exclude=[str(exclude)]))


# Validation


@pytest.mark.parametrize("seed", range(4))
def test_no_side_of_validation_is_in_training(seed: int, recipe: Any, packages: Callable[..., None]) -> None:
    pairs = toy_pairs(150)
    packages(imagenet21k=[(english.upper(), english.upper(), 1.0) for _, english in pairs])
    rows = [
        *pairs,
        *((f"“{target}”。", f"The {english}!") for target, english in pairs[:40]),  # the same target otherwise
        *((f"这是{target}", f"{english.capitalize()}.") for target, english in pairs[40:80]),  # the same English
        *NOUNS,
    ]
    made = recipe(rows, seed=seed, phrases=500, english_share=0.3)
    sources = (*made.data.train, TextSource("imagenet21k"))
    text = prepare(recipe(rows, seed=seed, phrases=500, english_share=0.3, train=[*map(vars, sources)]))
    assert 2 <= len(text.validation) <= 20
    assert text.counts["composed phrases"]["kept"] > 100
    for train, validation in zip(sides(text.train), sides(text.validation), strict=True):
        assert not train & validation
    # Not by dropping what need not go.
    assert len(set(text.train.targets) & {target for target, _ in pairs}) > 100


def test_a_validation_file_is_kept_out_of_training_as_a_whole(
    recipe: Any, tmp_path: Path, packages: Callable[..., None]
) -> None:
    packages()
    pairs = [*toy_pairs(200), *NOUNS]
    # Phrases such as "一个猫" that are made of NOUNS must not come back either.
    held_out = [(f"{target}。", english.upper()) for target, english in pairs[:100]] + [("一个猫", "a cat")]
    path = write_pairs(tmp_path / "validation.csv", held_out)
    text = prepare(recipe(pairs, validation=[str(path)], phrases=2000))
    assert len(text.validation) == 20
    assert set(text.validation.targets) <= {target for target, _ in held_out}
    assert text.counts["excluded as validation texts"]["dropped"] == 100
    assert text.counts["all sources"]["kept"] == 206
    assert text.counts["validation: all sources"]["kept"] == 101
    held = ParallelText.from_pairs(held_out)
    for train, validation in zip(sides(text.train), sides(held), strict=True):
        assert not train & validation


def test_test_texts_do_not_choose_the_weights(recipe: Any, tmp_path: Path) -> None:
    validation = write_pairs(tmp_path / "validation.csv", [("船", "boat"), ("马", "horse"), ("牛", "cow")])
    exclude = write_pairs(tmp_path / "test.csv", [("船！",)], ("text",))
    text = prepare(recipe(validation=[str(validation)], exclude=[str(exclude)]))
    assert set(text.validation.targets) == {"马", "牛"}


@pytest.mark.parametrize(
    ("rows", "data", "expected"),
    [
        (None, {"validation_size": 200}, r"data\.validation_size=200 leaves nothing of 200 pairs.* example to 20"),
        ([("猫", "cat")], {"validation_size": 2}, r"data\.validation_size=2 leaves nothing of 1 pairs"),
        ([(t, "thing") for t, _ in toy_pairs(100)], {}, "nearly all share a sentence with another"),
    ],
)
def test_too_little_to_validate_on(rows: Any, data: dict[str, Any], expected: str, recipe: Any) -> None:
    with pytest.raises((DataError, RecipeError), match=expected):
        prepare(recipe(rows, **data))


def test_one_pair_is_no_validation(recipe: Any, tmp_path: Path) -> None:
    one = write_pairs(tmp_path / "validation.csv", [("船", "boat")])
    with pytest.raises(DataError, match="validation needs at least 2 pairs, and 1 can be used"):
        prepare(recipe(validation=[str(one)]))


def test_validating_on_the_training_file_leaves_nothing(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair is left to train on: all share a sentence with the validation"):
        prepare(recipe(validation=[str(tmp_path / "pairs.csv")]))


def test_the_seed_alone_decides(recipe: Any, packages: Callable[..., None]) -> None:
    packages()
    rows = [*toy_pairs(100), *NOUNS]
    once, again, other = (
        prepare(recipe(rows, seed=seed, phrases=50, english_share=0.2)) for seed in (1, 1, 2)
    )  # fmt: skip
    assert (once.train.digest, once.validation.digest) == (again.train.digest, again.validation.digest)
    assert once.validation.digest != other.validation.digest


# Additions


def test_phrases_are_composed_of_known_nouns(recipe: Any, packages: Callable[..., None]) -> None:
    packages()
    text = prepare(recipe([*toy_pairs(100), *NOUNS], phrases=200))
    made = text.train.take(np.arange(len(text.train) - text.counts["composed phrases"]["kept"], len(text.train)))
    assert 100 < len(made) <= 200
    assert set(made.languages) == {"zh"}
    names = [target for target, _ in NOUNS]
    assert all(any(name in target for name in names) for target in made.targets)


@pytest.mark.parametrize("language", ["ja", "und"])
def test_phrases_need_a_grammar(language: str, recipe: Any, tmp_path: Path, packages: Callable[..., None]) -> None:
    packages()
    source = {"path": str(tmp_path / "pairs.csv"), "language": language}
    with pytest.raises(RecipeError, match=r"data\.phrases=10.*no nouns of a language.*\(zh\): set data\.phrases=0"):
        prepare(recipe([*toy_pairs(100), *NOUNS], train=[source], phrases=10))


@pytest.mark.parametrize(("wanted", "kept"), [(4, 4), (13, 13), (1000, len(NOUNS) * len(DEFAULT_TEMPLATES["zh"]))])
def test_nouns_stand_in_templates_as_classes_do(
    wanted: int, kept: int, recipe: Any, packages: Callable[..., None]
) -> None:
    packages()
    known = toy_pairs(100)
    text = prepare(recipe([*known, *NOUNS], templates=wanted, validation_size=2, english_share=0))
    lost = len(NOUNS) - len(set(dict(NOUNS)) & set(text.train.targets))  # a noun may have become a validation pair
    made = text.train.take(np.arange(len(text.train) - text.counts["nouns in templates"]["kept"], len(text.train)))
    assert len(made) == min(wanted, kept - lost * len(DEFAULT_TEMPLATES["zh"]))
    assert len({*zip(made.targets, made.english, strict=True)}) == len(made)
    ways = list(zip(DEFAULT_TEMPLATES["zh"], DEFAULT_TEMPLATES["en"], strict=True))
    for target, english in zip(made.targets, made.english, strict=True):
        assert any(
            target == own.replace("{}", noun) and english == theirs.replace("{}", name)
            for own, theirs in ways
            for noun, name in NOUNS
        )
    times = [sum(noun in target for target in made.targets) for noun in set(dict(NOUNS)) & set(text.train.targets)]
    assert max(times) - min(times) <= 1


def test_templates_need_a_language_that_has_some(recipe: Any, tmp_path: Path, packages: Callable[..., None]) -> None:
    packages()
    source = {"path": str(tmp_path / "pairs.csv"), "language": "ja"}
    with pytest.raises(RecipeError, match=r"data\.templates=10.*default templates \(zh\): set data\.templates=0"):
        prepare(recipe([*toy_pairs(100), *NOUNS], train=[source], templates=10))


@pytest.mark.parametrize("option", ["phrases", "templates"])
def test_a_tag_with_a_country_has_the_sentences_of_its_language(
    option: str, recipe: Any, tmp_path: Path, packages: Callable[..., None]
) -> None:
    packages()
    source = {"path": str(tmp_path / "pairs.csv"), "language": "zh-CN"}
    rows = [*toy_pairs(100), *NOUNS]
    of_country = prepare(recipe(rows, train=[source], **{option: 30}))
    of_language = prepare(recipe(rows, **{option: 30}))
    assert of_country.train.targets == of_language.train.targets
    assert len(of_country.train) > 100
    assert set(of_country.train.languages) == {"zh-CN"}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_english_share_is_what_is_drawn(share: float, recipe: Any) -> None:
    made = recipe(english_share=share)
    text = prepare(made)
    english = np.array([language == "en" for language in text.train.languages])
    assert text.counts["English-English pairs"]["kept"] == english.sum() > 10
    assert all(t == e for t, e, both in zip(text.train.targets, text.train.english, english, strict=True) if both)
    probability = drawing_probability(text.train, made.data)
    assert probability.sum() == pytest.approx(1)
    assert probability[english].sum() == pytest.approx(share)


def test_languages_are_balanced_beside_english(recipe: Any, tmp_path: Path) -> None:
    pairs = toy_pairs(200)
    small = write_pairs(tmp_path / "small.csv", [(target + "です", english) for target, english in pairs[:20]])
    sources = [str(tmp_path / "pairs.csv"), {"path": str(small), "language": "ja"}]
    made = recipe(train=sources, english_share=0.2, language_balance=0.0)
    text = prepare(made)
    languages = np.array(text.train.languages)
    probability = drawing_probability(text.train, made.data)
    shares = {code: float(probability[languages == code].sum()) for code in ("zh", "ja", "en")}
    assert shares == pytest.approx({"zh": 0.4, "ja": 0.4, "en": 0.2})


def unused(_: str) -> Iterator[Any]:
    raise AssertionError("no package may be touched")


def test_files_alone_touch_no_package(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PREPARED:
        monkeypatch.setitem(PREPARED, name, unused)
    assert len(prepare(recipe(english_share=0.1)).train) > 150


@pytest.mark.parametrize(("language", "count"), [("zh", 3), ("zh", 1000), ("ja", 1000)])
def test_nouns_go_into_a_memory(
    language: str, count: int, recipe: Any, tmp_path: Path, packages: Callable[..., None]
) -> None:
    packages()
    source = {"path": str(tmp_path / "pairs.csv"), "language": language}
    asked = recipe([*toy_pairs(100), *NOUNS], train=[source], validation_size=2)
    assert prepare(asked).words is None
    text = prepare(replace(asked, adapter=replace(asked.adapter, memory=count)))
    assert text.words is not None
    known = {noun: name for noun, name in NOUNS if noun in set(text.train.targets)}
    own, english = ("一张{}的照片", "a photo of a {}") if language == "zh" else ("{}", "{}")
    made = dict(zip(text.words.pairs.targets, text.words.pairs.english, strict=True))
    expected = {own.replace("{}", noun): english.replace("{}", name) for noun, name in known.items()}
    assert made.items() <= expected.items()
    assert len(made) == min(count, len(expected)) == text.counts["words in the memory"]["kept"]
    ways = DEFAULT_TEMPLATES.get(language, [])
    assert text.words.templates == len(ways)
    assert len(text.words.variants) == len(made) * len(ways)
    for at in range(0, len(text.words.variants), max(1, len(ways))):
        first = text.words.variants[at]
        noun = next(noun for noun in known if own.replace("{}", noun) == first)
        assert list(text.words.variants[at : at + len(ways)]) == [way.replace("{}", noun) for way in ways]


def test_a_noun_is_remembered_with_all_of_its_meanings(
    recipe: Any, tmp_path: Path, packages: Callable[..., None]
) -> None:
    packages()
    names = dict(zip(("first", "second"), (name for _, name in NOUNS[:2]), strict=True))
    files = [
        {"path": str(write_pairs(tmp_path / f"{which}.csv", [("外套", name)])), "weight": weight, "language": "zh"}
        for (which, name), weight in zip(names.items(), (3.0, 1.5), strict=True)
    ]
    others = write_pairs(tmp_path / "others.csv", [("一", "one"), ("二", "two")])
    source = {"path": str(tmp_path / "pairs.csv"), "language": "zh"}
    asked = recipe(toy_pairs(100), train=[source, *files], validation=[str(others)])
    asked = replace(asked, adapter=replace(asked.adapter, memory=100))
    text = prepare(asked)
    assert text.words is not None
    pairs = text.words.pairs
    held = {
        (english, weight)
        for target, english, weight in zip(pairs.targets, pairs.english, pairs.weights.tolist(), strict=True)
        if target == "一张外套的照片"
    }
    assert held == {(f"a photo of a {names['first']}", 3.0), (f"a photo of a {names['second']}", 1.5)}
    assert text.counts["words in the memory"] == {"kept": len(set(pairs.targets))}
    assert text.words.variants.count("一张外套的照片") == 1


@pytest.mark.parametrize(
    ("noun", "held"),
    [("Schmetterling", True), ("Donaudampfschifffahrtsgesellschaft", False), ("猫" * 8, True), ("猫" * 9, False)],
)
def test_a_noun_of_the_memory_is_short_for_its_script(
    noun: str, held: bool, recipe: Any, packages: Callable[..., None]
) -> None:
    packages()
    asked = recipe([*toy_pairs(100), *NOUNS[:5], (noun, "flower")], validation_size=2, seed=3)
    text = prepare(replace(asked, adapter=replace(asked.adapter, memory=100)))
    assert text.words is not None
    assert noun in text.train.targets
    assert (f"一张{noun}的照片" in text.words.pairs.targets) == held


def test_english_names_stand_for_themselves_where_the_adapter_reads_english(
    recipe: Any, tmp_path: Path, packages: Callable[..., None]
) -> None:
    packages()
    source = {"path": str(tmp_path / "pairs.csv"), "language": "de"}
    nouns = [("Hund", "dog"), ("Vogel", "bird"), ("Tee", "tea"), ("bird", "cat")]
    others = write_pairs(tmp_path / "others.csv", [("eins", "one"), ("zwei", "two")])
    asked = recipe(nouns, train=[source], validation=[str(others)])
    asked = replace(asked, adapter=replace(asked.adapter, memory=100))
    for english, names in (("route", set()), ("adapter", {"dog", "tea", "cat"})):  # a spelling has one meaning
        text = prepare(replace(asked, english=english))
        assert text.words is not None
        made = set(zip(text.words.pairs.targets, text.words.pairs.english, strict=True))
        assert made == {*nouns, *((name, name) for name in names)}


def test_a_memory_without_words_is_none(recipe: Any, tmp_path: Path, packages: Callable[..., None]) -> None:
    packages()
    names = write_pairs(tmp_path / "names.csv", [[f"一张{noun}的照片"] for noun, _ in NOUNS], header=["text"])
    asked = recipe([*toy_pairs(100), *NOUNS], validation_size=2, exclude=[str(names)])
    text = prepare(replace(asked, adapter=replace(asked.adapter, memory=100)))
    assert text.words is None
    assert text.counts["words in the memory"] == {"kept": 0}


def test_a_memory_holds_no_test_text(recipe: Any, tmp_path: Path, packages: Callable[..., None]) -> None:
    packages()
    target = f"一张{NOUNS[0][0]}的照片"
    (tmp_path / "test.csv").write_text(f"text\n{target}\n", encoding="utf-8")
    asked = recipe([*toy_pairs(100), *NOUNS], exclude=[str(tmp_path / "test.csv")], validation_size=2)
    text = prepare(replace(asked, adapter=replace(asked.adapter, memory=100)))
    assert text.words is not None
    assert target not in text.words.pairs.targets


# Tags


def told(recipe: LanguageRecipe, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    prepare(recipe)
    return caplog.text


def test_a_file_of_another_language_that_is_taken_for_chinese_is_told(
    recipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    japanese = [(f"{i}匹のネコ", f"cats {i}") for i in range(60)]
    german = [(f"{i} Katzen", f"cats {i}") for i in range(60)]
    for rows, example in ((japanese, "匹のネコ"), (german, " Katzen")):
        assert re.search(f"60 of 60 pairs of language zh have a target that is not Chinese, '.*{example}'",
                         told(recipe(rows), caplog))  # fmt: skip
    source = {"path": str(tmp_path / "pairs.csv"), "language": "de"}
    assert "not Chinese" not in told(recipe(german, train=[source]), caplog)
    assert told(recipe([*toy_pairs(100), ("T-shirt", "t-shirt")]), caplog) == ""


def test_pairs_under_two_tags_are_counted(recipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "pairs.csv")
    twice = [{"path": path, "language": tag} for tag in ("zh", "ja")]
    assert "200 pairs stand under several languages, ja and zh" in told(recipe(train=twice), caplog)
    other = write_pairs(tmp_path / "other.csv", [*NOUNS, *((f"o{i}", f"e{i}") for i in range(20))])
    some = [path, {"path": str(other), "language": "de"}]
    assert "several languages" not in told(recipe([*toy_pairs(100), *NOUNS], train=some), caplog)


# What cannot be learned from


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("猫", "cat"), ("小猫", "Cat.")], "all 2 training pairs have the same english text, 'cat'"),
        ([("猫", "cat"), ("猫。", "kitten")], "all 2 training pairs have the same target text, '猫'"),
    ],
)
def test_pairs_of_one_text_are_refused(
    rows: list[tuple[str, str]], message: str, recipe: Callable[..., LanguageRecipe], tmp_path: Path
) -> None:
    held_out = write_pairs(tmp_path / "validation.csv", [("鸟", "bird"), ("花", "flower")])
    with pytest.raises(DataError, match=message):
        prepare(recipe(rows, validation=[str(held_out)]))


def test_much_that_is_set_aside_is_told(
    recipe: Callable[..., LanguageRecipe], caplog: pytest.LogCaptureFixture
) -> None:
    prepare(recipe(validation_size=60))
    assert not caplog.messages
    prepare(recipe(validation_size=150))
    assert caplog.messages[0].startswith("150 of 200 pairs are set aside for validation")
    assert caplog.messages[0].endswith("set data.validation_size lower, for example to 20")


@pytest.mark.parametrize("size", [2, 500])
def test_too_few_pairs_are_not_told_to_be_fewer(size: int, recipe: Callable[..., LanguageRecipe]) -> None:
    with pytest.raises(RecipeError, match="leaves nothing of 2 pairs to train on: give more pairs"):
        prepare(recipe([("猫", "cat"), ("狗", "dog")], validation_size=size))


def test_english_is_no_validation_pair(recipe: Callable[..., LanguageRecipe], tmp_path: Path) -> None:
    rows = [("鸟", "bird", "zh"), ("花", "flower", ""), ("tea", "tea", "en"), ("chair", "chair", "EN-us")]
    path = write_pairs(tmp_path / "validation.csv", rows, ("target", "english", "language"))
    assert prepare(recipe(validation=[str(path)])).validation.targets == ["鸟", "花"]


@pytest.mark.parametrize("tag", ["EN", "en-US", "en_GB"])
def test_english_by_other_tags_is_english(tag: str, tmp_path: Path) -> None:
    path = write_pairs(
        tmp_path / "p.csv", [("a cat", "a cat", tag), ("猫", "cat", "")], ("target", "english", "language")
    )
    assert read_source(TextSource(str(path), language="zh-CN")).languages == ["en", "zh-CN"]
