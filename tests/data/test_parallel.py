from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data.parallel import (
    ParallelText,
    clean,
    clean_text,
    letters,
    read_parallel,
    says_nothing,
    split_validation,
)
from trimtab.errors import DataError, RecipeError
from trimtab.scripts import normal_form

TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "\u200b", "\ufe0f", "狗", "dog", "a\tb", "\x00", "\ud800"]),
)
PAIRS = st.lists(st.tuples(TEXT, TEXT, st.sampled_from(["zh", "de"])), max_size=25)


def made_of(rows: list[tuple[str, str, str]]) -> ParallelText:
    return ParallelText([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])


def test_columns_must_agree() -> None:
    with pytest.raises(ValueError, match="2 targets, 1 english"):
        ParallelText(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="positive"):
        ParallelText(["a"], ["b"], weights=np.array([0.0]))


def test_take_concat_and_digest() -> None:
    pairs = ParallelText(["狗", "猫", "鸟"], ["dog", "cat", "bird"], ["zh"] * 3, np.array([1, 2, 3]))
    assert pairs.take([2, 0]).targets == ["鸟", "狗"]
    assert pairs.take([2, 0]).weights.tolist() == [3, 1]
    assert pairs.take(np.array([False, True, False])).english == ["cat"]
    assert len(pairs.take([])) == 0
    both = pairs.concat(pairs.take([1]), ParallelText.from_pairs([("Hund", "dog")], "de"))
    assert both.targets == ["狗", "猫", "鸟", "猫", "Hund"]
    assert both.language_counts() == {"zh": 4, "de": 1}
    assert both.weights.dtype == np.float32
    assert pairs.digest == pairs.take([0, 1, 2]).digest
    heavier = ParallelText(pairs.targets, pairs.english, pairs.languages, np.array([1, 2, 4]))
    shifted = ParallelText(["狗", "猫", "鸟d"], ["og", "cat", "bird"], ["zh"] * 3, pairs.weights)
    assert len({part.digest for part in (pairs, both, heavier, shifted, pairs.take([1, 0, 2]))}) == 5


def test_sampling_weights_balance_languages() -> None:
    weights = np.ones(10)
    weights[0] = 3
    pairs = ParallelText(["x"] * 10, ["y"] * 10, ["zh"] * 8 + ["de"] * 2, weights)
    for temperature, share in ((1.0, 0.8), (0.0, 0.5), (0.5, 8**0.5 / (8**0.5 + 2**0.5))):
        probability = pairs.sampling_weights(temperature)
        assert probability.sum() == pytest.approx(1)
        assert probability[:8].sum() == pytest.approx(share)
        assert probability[0] == pytest.approx(3 * probability[1])
    for temperature in (-0.1, 1.5, float("nan")):
        with pytest.raises(RecipeError, match=r"0\.\.1"):
            pairs.sampling_weights(temperature)
    assert len(made_of([]).sampling_weights(1)) == 0


def test_read_parallel(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("zh,en,weight,language\n狗,dog,2.5,\nHund,dog,,de\n,empty,1,\n", encoding="utf-8")
    pairs = read_parallel(path, target="zh", english="en", language="zh-CN")
    assert pairs.targets == ["狗", "Hund", ""]
    assert pairs.languages == ["zh-CN", "de", "zh-CN"]
    assert pairs.weights.tolist() == [2.5, 1, 1]
    with pytest.raises(DataError, match="no column 'target'"):
        read_parallel(path)


@pytest.mark.parametrize("weight", ["0", "-1", "heavy", "nan", "inf", "1e-60"])
def test_bad_weights_name_the_row(weight: str, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f"target,english,weight\n狗,dog,1\n猫,cat,{weight}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"row 3: weight '{weight}'"):
        read_parallel(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_missing_text_is_dropped_and_counted(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs{suffix}"
    columns = {"target": ["狗", None, "猫"], "english": ["dog", "bird", None]}
    if suffix == ".csv":
        path.write_text("target,english\n狗,dog\n,bird\n猫,\n", encoding="utf-8")
    elif suffix == ".jsonl":
        records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        pq.write_table(pa.table(columns), path)
    kept, counts = clean(read_parallel(path))
    assert (kept.targets, kept.english) == (["狗"], ["dog"])
    assert (counts.kept, counts.empty) == (1, 2)


def test_clean_text() -> None:
    assert clean_text(" \ufeff 一\u3000只\x07 狗\r\n\t ") == "一 只 狗"
    assert clean_text("👩\u200d🚀 می\u200cخواهم") == "👩\u200d🚀 می\u200cخواهم", "joiners carry meaning"
    assert clean_text("A\u0308pfel") == "Äpfel"
    assert clean_text("كـتـاب ـ") == "كتاب"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(st.text(max_size=3), st.sampled_from([*"ـﾞ \t\n\xa0\u3000\xad\u200d\ufeff\ufe0f\u0308\x07Ab.½狗"]))
    )
)
def test_texts_with_nothing_to_drop_are_no_exception(parts: list[str]) -> None:
    text = "".join(parts)
    junk = [c for c in text if (unicodedata.category(c) in ("Cc", "Cs") and not re.match(r"\s", c)) or c == "\ufeff"]
    blanks = text.translate(dict.fromkeys(map(ord, junk), None)).split()
    assert clean_text(text) == " ".join(normal_form(" ".join(blanks)).split())
    assert clean_text(clean_text(text)) == clean_text(text)
    seen = [c for c in text if unicodedata.category(c)[0] not in "CZ" and not "\ufe00" <= c <= "\ufe0f"]
    assert says_nothing(text) == (not seen)


def test_each_rule_counts_its_own() -> None:
    rows = [
        ("狗", "dog"),
        (" 狗 ", "dog\n"),
        ("", "x"),
        ("\u200b", "x"),
        ("猫", "a"),
        ("长" * 301, "long " * 60),
        ("狗", "d" * 290),
        ("USB", "USB"),
        ("小狗", "puppy"),
    ]
    pairs = ParallelText.from_pairs(rows, "zh")
    kept, counts = clean(pairs, min_chars=1, drop_identical=True)
    assert kept.targets == ["狗", "猫", "小狗"]
    assert counts.as_dict() == {
        "kept": 3,
        "empty": 2,
        "too_short": 0,
        "too_long": 1,
        "length_ratio": 1,
        "identical": 1,
        "duplicate": 1,
    }
    assert clean(pairs, max_ratio=None)[1].length_ratio == 0
    assert clean(pairs, min_chars=2)[1].too_short == 4
    assert "USB" in clean(pairs)[0].targets


def test_usual_lengths_pass_the_ratio() -> None:
    rows = [
        ("的", "of; possessive particle; used after an attribute"),
        ("一只棕色的狗在绿色的草地上奔跑", "a brown dog runs across the green grass"),
        ("एक भूरा कुत्ता हरी घास पर दौड़ रहा है", "a brown dog runs across the green grass"),
        ("Ein brauner Hund läuft über das grüne Gras", "a brown dog runs across the green grass"),
        ("சிவப்பு பூவின் மீது அமர்ந்திருக்கும் வண்ணத்துப்பூச்சி மற்றும் பச்சை இலைகள்", "butterfly"),
    ]
    assert clean(ParallelText.from_pairs(rows))[1].kept == 5
    assert letters("字ガ가、") == 12
    assert letters("Öl பூ") == 5


def test_nothing_left_says_which_rule() -> None:
    with pytest.raises(DataError, match=r"no pair is left of 3 .*empty 2, too_long 1"):
        clean(ParallelText.from_pairs([("", "a"), ("b", " "), ("c" * 400, "d" * 400)]))
    with pytest.raises(DataError, match="there were none"):
        clean(ParallelText([], []))


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.booleans())
def test_cleaning_holds_for_any_text(rows: list[tuple[str, str, str]], drop_identical: bool) -> None:
    pairs = made_of(rows)
    try:
        kept, counts = clean(pairs, drop_identical=drop_identical)
    except DataError:
        return
    assert sum(counts.as_dict().values()) == len(rows)
    assert counts.kept == len(kept) == len(set(zip(kept.languages, kept.targets, kept.english)))
    for text in (*kept.targets, *kept.english):
        assert any(unicodedata.category(char)[0] not in "ZC" for char in text)
        assert text == clean_text(text)
        text.encode()
    again, recount = clean(kept, drop_identical=drop_identical)
    assert recount.kept == len(kept) == sum(recount.as_dict().values())
    assert again.digest == kept.digest


def check_split(pairs: ParallelText, size: int, seed: int) -> tuple[ParallelText, ParallelText]:
    train, validation = split_validation(pairs, size, seed)
    assert 0 < len(validation) <= size
    assert len(train) + len(validation) == len(pairs)
    assert sorted(zip(train.targets + validation.targets, train.english + validation.english)) == sorted(
        zip(pairs.targets, pairs.english)
    )
    for left, right in ((train.targets, validation.targets), (train.english, validation.english)):
        assert not {text.casefold() for text in left} & {text.casefold() for text in right}
    return train, validation


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=2, max_size=60),
    st.integers(1, 20),
    st.integers(0, 5),
)
def test_no_sentence_leaks_into_validation(edges: list[tuple[int, int]], size: int, seed: int) -> None:
    pairs = ParallelText.from_pairs([(f"t{a}", ("E" if a % 2 else "e") + str(b)) for a, b in edges])
    with contextlib.suppress(DataError):  # when everything hangs together
        check_split(pairs, size, seed)


def test_split_is_seeded_and_of_the_size_asked_for() -> None:
    pairs = ParallelText.from_pairs([(f"t{i}", f"e{i // 2}") for i in range(2000)])
    train, validation = check_split(pairs, 100, seed=1)
    assert len(validation) == 100
    assert validation.digest == split_validation(pairs, 100, 1)[1].digest
    assert validation.digest != split_validation(pairs, 100, 2)[1].digest
    assert train.targets == sorted(train.targets, key=lambda text: int(text[1:])), "order is kept"


def of_languages(**counts: int) -> ParallelText:
    parts = [
        ParallelText.from_pairs([(f"{tag}{i}", f"{tag} e{i}") for i in range(count)], tag)
        for tag, count in counts.items()
    ]
    return parts[0].concat(*parts[1:])


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ({"zh": 3000, "ja": 1000}, 400, {"zh": 300, "ja": 100}),
        ({"zh": 5000, "de": 200, "ja": 30}, 500, {"zh": 477, "de": 20, "ja": 3}),
        ({"zh": 60_000, "de": 2000}, 1000, {"zh": 900, "de": 100}),
        (
            {"zh": 2000, "de": 2000, "ja": 1000},
            30,
            {"zh": 10, "de": 10, "ja": 10},
        ),  # room for a part of what each needs
        ({"zh": 40, "de": 9}, 2, {"zh": 2}),
    ],
)
def test_each_language_has_its_part_of_validation(counts: dict[str, int], size: int, expected: dict[str, int]) -> None:
    _, validation = check_split(of_languages(**counts), size, seed=0)
    assert validation.language_counts() == expected


def test_a_small_language_is_validated_though_its_english_is_another_ones_too() -> None:
    pairs = ParallelText.from_pairs([(f"zh{i}", f"e{i}") for i in range(3000)], "zh")
    pairs = pairs.concat(ParallelText.from_pairs([(f"de{i}", f"e{i}") for i in range(500)], "de"))
    _, validation = check_split(pairs, 300, seed=0)
    assert validation.language_counts() == {"zh": 250, "de": 50}


def test_a_table_with_a_column_for_each_of_many_languages_is_split() -> None:
    tags = ["de", "ja", "ar", "th", "hi", "ko"]
    columns = [ParallelText.from_pairs([(f"{tag}{i}", f"e{i}") for i in range(60)], tag) for tag in tags]
    _, validation = check_split(columns[0].concat(*columns[1:]), 36, seed=0)
    assert validation.language_counts() == dict.fromkeys(tags, 6)


def test_a_giant_group_stays_in_training() -> None:
    tied = [(f"word{i}", "to do") for i in range(1000)]
    single = [(f"t{i}", f"e{i}") for i in range(300)]
    train, validation = check_split(ParallelText.from_pairs(tied + single), 100, seed=0)
    assert len(validation) == 100
    assert train.english.count("to do") == 1000


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(DataError, match="ask for fewer"):
        split_validation(ParallelText.from_pairs([("a", "b"), ("c", "d")]), 2, 0)
    with pytest.raises(DataError, match="validation file of its own"):
        split_validation(ParallelText.from_pairs([(f"t{i}", "same") for i in range(50)]), 5, 0)
    with pytest.raises(RecipeError, match="at least 1"):
        split_validation(ParallelText.from_pairs([("a", "b"), ("c", "d")]), 0, 0)
