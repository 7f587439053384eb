from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.scripts import is_latin, normal_form

LATIN = (
    "a photo of a cat",
    "Straße",
    "naïve café",
    "Łódź",
    "Việt",
    "ＡＢＣ",
    "ﬁsh",
    "20 ºC",
    "a 10 \u00b5m filter",  # the micro sign
    "a beach of Hawai\u02bbi",
    "don\u02bct",
    "42!",
    "",
    " ",
    "🐱",
    "日"[:0],
)
FOREIGN = ("猫", "a 猫", "カメラ", "ｶﾒﾗ", "кот", "γάτα", "\u03bc", "قطة", "बिल्ली", "고양이", "แมว", "３匹の猫")


@pytest.mark.parametrize("text", LATIN)
def test_latin(text: str) -> None:
    assert is_latin(text)


@pytest.mark.parametrize("text", FOREIGN)
def test_other_scripts(text: str) -> None:
    assert not is_latin(text)


@given(st.text(alphabet=string.printable), st.sampled_from("猫кγ고"), st.integers(0, 20))
def test_one_foreign_letter_decides(text: str, letter: str, place: int) -> None:
    assert is_latin(text)
    assert not is_latin(text[:place] + letter + text[place:])


@given(st.text(), st.text())
def test_a_text_is_latin_if_its_parts_are(one: str, other: str) -> None:
    assert is_latin(one + other) == (is_latin(one) and is_latin(other))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a cat", "a cat"),
        ("A\u0308pfel", "Äpfel"),
        ("\u1109\u1161\u1100\u116a", "사과"),
        ("ｶﾞﾗｽ", "ガラス"),
        ("كـتـاب", "كتاب"),
        ("ＡＢＣ ①", "ＡＢＣ ①"),
    ],
)
def test_letters_have_one_form(written: str, read: str) -> None:
    assert normal_form(written) == read == normal_form(read)
