from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from real_packages import needs
from trimtab.data import corpora
from trimtab.data.packages import PACKAGES
from trimtab.errors import DataError

CACHED: list[Any] = [corpora.concrete_nouns, corpora.emoji_table, corpora.held_out_emoji]
SYNSETS = {
    "n1": ("dog, domestic dog, Canis familiaris", "a member of the genus Canis"),
    "n2": ("apple", "fruit with red or yellow or green skin"),
    "n3": ("Bus stop", ""),
}
CEDICT = [
    ["狗", "狗", "gou3", ["dog", "CL:隻|只[zhi1],條|条[tiao2]"]],
    ["蘋果", "苹果", "ping2 guo3", ["apple; Apple (the company)", "CL:個|个[ge4]", "apple", "an apple tree"]],
    ["王", "王", "Wang2", ["surname Wang", "king"]],
    ["類型", "类型", "lei4 xing2", ["type", "Taiwan pr. [lei4 xing5]", "abbr. for 某[mou3]", "to see (old)"]],
    ["個兒", "个儿", "ge4 r5", ["erhua variant of 個|个[ge4]"]],
    ["AA制", "AA", "A A", ["to split the bill"]],  # not Chinese in its simplified form
    ["打", "打", "da3", ["to hit", "to beat", "to fight", "to play", "to make"]],
    ["一", "一", "yi1", "one"],
]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder with a small synthetic folder of each package."""

    def fetch(key: str) -> Path:
        assert key in PACKAGES
        return tmp_path / key

    def fetch_file(key: str, pattern: str) -> Path:
        (path,) = fetch(key).rglob(pattern.removeprefix("*/"))
        return path

    monkeypatch.setattr(corpora, "fetch", fetch)
    monkeypatch.setattr(corpora, "fetch_file", fetch_file)
    info = tmp_path / "imagenet-names/timm/data/_info"
    info.mkdir(parents=True)
    for kind, column in (("lemma", 0), ("definition", 1)):
        lines = [f"{key}\t{texts[column]}" for key, texts in SYNSETS.items() if texts[column]]
        (info / f"imagenet_synset_to_{kind}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    dictionary = tmp_path / "cc-cedict/package/data/all.js"
    dictionary.parent.mkdir(parents=True)
    text = "export default " + json.dumps({"all": CEDICT}, ensure_ascii=False) + ";\n"
    dictionary.write_text(text, encoding="utf-8")
    for function in CACHED:
        function.cache_clear()
    yield tmp_path
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def emoji(fake: Path) -> Callable[..., None]:
    """Write annotations of some locales and OpenMoji's table."""

    def write(table: list[dict[str, Any]], **locales: dict[str, Any]) -> None:
        for locale, entries in locales.items():
            path = fake / f"cldr-annotations/package/annotations/{locale}/annotations.json"
            path.parent.mkdir(parents=True)
            content = {"annotations": {"identity": {}, "annotations": entries}}
            path.write_text(json.dumps(content), encoding="utf-8")
        path = fake / "openmoji/package/data/openmoji.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(table), encoding="utf-8")

    return write


def entry(symbol: str, *, group: str = "animals-nature", skintone: str = "") -> dict[str, str]:
    return {"emoji": symbol, "group": group, "subgroups": f"sub-{group}", "skintone": skintone}


# Weights


def test_names_of_visible_things_weigh_more(fake: Path) -> None:
    assert corpora.concrete_nouns() == {"dog", "domestic dog", "canis familiaris", "apple", "bus stop"}
    for name in ("dog", "Dog", "a dog", "the dogs", "an apple", "bus stops"):
        assert corpora.weight_of(name) == corpora.CONCRETE_WEIGHT
    for name in ("dogma", "to dog", "freedom", "a"):
        assert corpora.weight_of(name) == 1


def test_texts_of_visible_things(fake: Path) -> None:
    assert list(corpora.imagenet21k_texts()) == [
        *(("dog", 1.0), ("domestic dog", 1.0), ("Canis familiaris", 1.0), ("dog, a member of the genus Canis", 0.5)),
        *(("apple", 1.0), ("apple, fruit with red or yellow or green skin", 0.5), ("Bus stop", 1.0)),
    ]


def test_classes_stand_in_the_order_of_a_classifiers_outputs(fake: Path) -> None:
    described = [key for key, texts in SYNSETS.items() if texts[1]]
    info = fake / "imagenet-names/timm/data/_info"
    (info / "imagenet_synsets.txt").write_text("\n".join(reversed(described)) + "\n", encoding="utf-8")
    assert corpora.imagenet_classes() == [
        (["apple"], "fruit with red or yellow or green skin"),
        (["dog", "domestic dog", "Canis familiaris"], "a member of the genus Canis"),
    ]


# CC-CEDICT


def test_dictionary_entries_become_pairs(fake: Path) -> None:
    pairs: dict[str, dict[str, float]] = {}
    for target, english, weight in corpora.cedict_pairs():
        assert english not in pairs.setdefault(target, {})
        pairs[target][english] = weight
    assert pairs == {
        "狗": {"dog": 3.0},
        "苹果": {"apple": 3.0, "an apple tree": pytest.approx(1 / 1.5)},
        "王": {"king": 0.5},
        "类型": {"type": 1.0, "to see": pytest.approx(1 / 1.5)},
        "打": {"to hit": 1.0, "to beat": pytest.approx(1 / 1.5), "to fight": 0.5, "to play": pytest.approx(0.4)},
        "一": {"one": 1.0},
    }
    assert {english for _, english, _ in corpora.cedict_pairs(max_glosses=1)} == {
        *("dog", "apple", "king", "type", "to hit", "one")
    }


def test_the_dictionary_is_read_once_until_it_changes(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = fake.rglob("all.js")
    pairs = list(corpora.cedict_pairs())
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "_read_cedict", None)
        assert list(corpora.cedict_pairs()) == pairs
    text = json.dumps({"all": [["貓", "猫", "mao1", ["cat"]]]}, ensure_ascii=False)
    path.write_text(f"export default {text};\n", encoding="utf-8")
    os.utime(path, ns=(0, 0))
    assert [pair[:2] for pair in corpora.cedict_pairs()] == [("猫", "cat")]


@pytest.mark.parametrize(
    ("gloss", "expected"),
    [
        ("  red   apple ", "red apple"),
        ("apple (fruit)", "apple"),
        ("(bound form) apple", "apple"),
        ("apple (CL:個|个[ge4])", "apple"),
        ("to see", "to see"),
        ("so called", "so called"),
        ("see you tomorrow", "see you tomorrow"),
        ("press", "press"),
        ("China, abbr. for 中華人民共和國|中华人民共和国[Zhong1 hua2]", "China"),
        ("potato, also called 土豆[tu3 dou4]", "potato"),
    ],
)
def test_glosses_are_cleaned(gloss: str, expected: str) -> None:
    assert corpora._clean_gloss(gloss) == expected


@pytest.mark.parametrize(
    "gloss",
    [
        *("", "(old)", "123", "CL:個|个[ge4]", "surname Li", "variant of 個|个[ge4]", "old variant of 個|个[ge4]"),
        *("see 你好[ni3 hao3]", "see also 你好[ni3 hao3]", "used in 尷尬|尴尬[gan1 ga4]", "same as 你好[ni3 hao3]"),
        *("Taiwan pr. [lei4]", "also pr. [lei4]", "pr. [lei4]", "coll. pr. [lei4]", "erhua form of 個|个[ge4]"),
        *("abbr. for 中國|中国[Zhong1 guo2]", "abbr. to 中國|中国", "also written 中國", "(Tw) abbr. for 中國|中国"),
        *("also called 土豆", "Kangxi radical 85", "the character 水"),
    ],
)
def test_cross_references_are_no_translations(gloss: str) -> None:
    assert corpora._clean_gloss(gloss) == ""


@given(st.text(alphabet="ab ()[]|;,:个国abbr.for", max_size=30))
def test_clean_glosses_hold_no_markup(gloss: str) -> None:
    clean = corpora._clean_gloss(gloss)
    assert clean == clean.strip()
    assert "  " not in clean
    assert not re.search(r"[|㐀-鿿]", clean)
    assert not clean or re.search(r"[A-Za-z]", clean)


# CLDR


CAT, DOG, HEART = "🐱", "🐶", "❤\u200d🔥"


def test_annotations_of_a_locale(emoji: Callable[..., None]) -> None:
    emoji([], en={CAT: {"tts": ["cat face"], "default": ["cat", "pet"]}, DOG: {"default": ["no name"]}}, de={})
    assert corpora.cldr_annotations("en") == {CAT: ("cat face", ["cat", "pet"])}
    with pytest.raises(DataError, match=r"no annotations for locale 'xx'; it has de, en"):
        corpora.cldr_annotations("xx")


def test_the_table_leaves_out_flags_and_skin_tones(emoji: Callable[..., None]) -> None:
    emoji(
        [
            *(entry(CAT), entry("❤\ufe0f\u200d🔥", group="smileys-emotion"), entry("👍🏽", skintone="3")),
            *(entry("🇨🇳", group="flags"), entry("x", group="extras-openmoji"), entry("🏽", group="component")),
        ]
    )
    assert corpora.emoji_table() == {CAT: "sub-animals-nature", HEART: "sub-smileys-emotion"}


def some_emoji(count: int) -> list[str]:
    return [chr(0x1F400 + i) for i in range(count)]


def named(symbols: list[str], form: str) -> dict[str, Any]:
    return {s: {"tts": [form.format(hex(ord(s)))], "default": [form.format(k) for k in range(8)]} for s in symbols}


def test_held_out_emoji_are_the_same_always(emoji: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = some_emoji(30)
    monkeypatch.setattr(corpora, "HELD_OUT_EMOJI", 10)
    # Only with a picture, an English and a Chinese name.
    emoji([entry(s) for s in symbols[2:]], en=named(symbols[:28], "e {}"), zh=named(symbols[4:], "中{}"))
    held_out = corpora.held_out_emoji()
    assert len(held_out) == 10
    assert held_out <= set(symbols[4:28])
    corpora.held_out_emoji.cache_clear()
    assert corpora.held_out_emoji() == held_out
    # Others may come and go: of those that stay, the same are chosen first.
    monkeypatch.setattr(corpora, "HELD_OUT_EMOJI", 5)
    corpora.held_out_emoji.cache_clear()
    assert corpora.held_out_emoji() < held_out


def test_annotation_pairs_keep_held_out_names_away(emoji: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = some_emoji(12)
    monkeypatch.setattr(corpora, "HELD_OUT_EMOJI", 4)
    english, target = named(symbols[:-1], "e {}"), named(symbols, "中{}")
    target[symbols[0]]["default"] = []
    emoji([entry(s) for s in symbols], en=english, zh=target)

    pairs = list(corpora.cldr_pairs("zh", with_held_out=True))
    by_target = {target: (english, weight) for target, english, weight in pairs}
    assert by_target[f"中{hex(ord(symbols[1]))}"] == (f"e {hex(ord(symbols[1]))}", 1.0)
    keywords = "、".join(f"中{k}" for k in range(6))
    assert by_target[f"中{hex(ord(symbols[1]))}：{keywords}"] == (
        f"e {hex(ord(symbols[1]))}: " + ", ".join(f"e {k}" for k in range(6)),
        0.5,
    )
    assert len(pairs) == 2 * 11 - 1  # the last has no English name, the first no keywords

    training = list(corpora.cldr_pairs("zh"))
    assert len(training) < len(pairs)
    for symbol in corpora.held_out_emoji():
        assert not any(hex(ord(symbol)) in target + english for target, english, _ in training)


@pytest.mark.parametrize(
    ("locale", "expected"), [("zh_Hant", "n 1：n 0、n 1"), ("ja", "n 1：n 0、n 1"), ("de", "n 1: n 0, n 1")]
)
def test_annotation_pairs_have_the_marks_of_their_language(
    emoji: Callable[..., None], locale: str, expected: str
) -> None:
    words = {CAT: {"tts": ["n 1"], "default": ["n 0", "n 1"]}}
    emoji([entry(CAT)], **{"en": words, "zh": words, locale: words})
    assert [target for target, _, _ in corpora.cldr_pairs(locale, with_held_out=True)] == ["n 1", expected]


# gettext


def write_mo(path: Path, messages: dict[str, str]) -> Path:
    """A compiled gettext catalogue: a table of sorted messages, one of translations, then the texts."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n != 1;\n", **messages}
    pairs = sorted((key.encode(), value.encode()) for key, value in messages.items())
    count, at, body, tables = len(pairs), 28 + 16 * len(pairs), b"", ([], [])
    for column in (0, 1):
        for pair in pairs:
            tables[column].append(struct.pack("<II", len(pair[column]), at + len(body)))
            body += pair[column] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + b"".join(tables[0]) + b"".join(tables[1]) + body)
    return path


def test_messages_of_a_catalogue(fake: Path) -> None:
    messages = {
        "dog": "狗",
        "A big   red apple.": "一个大红苹果。",
        "zombie dog\0zombie dogs": "僵尸狗\0很多僵尸狗",
        "noun\x04spring": "弹簧",
        "You have %d apples": "你有%d个苹果",
        "<color_red>Danger</color>": "危险",
        "Two\nlines": "两行",
        "translation with markup": "<b>翻译</b>",
        "Press {key}": "按键",
        "7": "七",
        "x" * 300: "长",
        "untranslated": "",
    }
    path = write_mo(fake / "catalogue.mo", messages)
    assert {(english, target): weight for target, english, weight in corpora.gettext_pairs(path)} == {
        ("dog", "狗"): 3.0,
        ("A big red apple.", "一个大红苹果。"): 1.0,
        ("zombie dog", "僵尸狗"): 1.0,
        ("spring", "弹簧"): 1.0,
    }
    assert [english for _, english, _ in corpora.gettext_pairs(path, min_words=3)] == ["A big red apple."]
    assert [english for _, english, _ in corpora.gettext_pairs(path, max_chars=3)] == ["dog"]


@pytest.mark.parametrize("content", [b"", b"\xde", b"not a catalogue at all", b"\xde\x12\x04\x95" + bytes(4)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.mo").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.mo is not a readable gettext catalogue"):
        list(corpora.gettext_pairs(tmp_path / "x.mo"))


def test_catalogues_cut_short_are_refused(tmp_path: Path) -> None:
    whole = write_mo(tmp_path / "x.mo", {"dog": "狗"}).read_bytes()
    for keep in range(4, len(whole) - 1, 7):
        (tmp_path / "x.mo").write_bytes(whole[:keep])
        with pytest.raises(DataError, match="not a readable gettext catalogue"):
            list(corpora.gettext_pairs(tmp_path / "x.mo"))
    with pytest.raises(DataError, match="not a readable gettext catalogue"):
        list(corpora.gettext_pairs(tmp_path / "absent.mo"))


def test_locales_of_the_game(fake: Path) -> None:
    folder = fake / "cataclysm-dda/usr/share/locale"
    write_mo(folder / "zh_CN/LC_MESSAGES/cataclysm-dda.mo", {"dog": "狗"})
    assert list(corpora.cataclysm_pairs("zh_CN")) == [("狗", "dog", 3.0)]
    with pytest.raises(DataError, match=r"no locale 'zh'; it has zh_CN"):
        list(corpora.cataclysm_pairs("zh"))


# The packages themselves


@needs("cc-cedict", "imagenet-names")
def test_the_real_dictionary() -> None:
    pairs = list(corpora.cedict_pairs())
    assert 180_000 < len(pairs) < 220_000
    names = {(target, english): weight for target, english, weight in pairs}
    assert names["苹果", "apple"] == 3.0
    assert ("狗", "dog") in names
    left = [english for _, english in names if re.match(r"(\w+ )?pr\.|abbr\. (for|to)$|variant of|CL:", english)]
    assert not left
    assert not any(re.search(r"[\[\]|㐀-鿿]", english) for _, english in names)


@needs("cldr-annotations", "openmoji", "imagenet-names")
def test_the_real_emoji_names() -> None:
    held_out = corpora.held_out_emoji()
    assert len(held_out) == corpora.HELD_OUT_EMOJI
    for locale in ("zh", "de"):
        target = corpora.cldr_annotations(locale)
        trained = {pair[0] for pair in corpora.cldr_pairs(locale)}
        assert len(trained) > 2000
        assert not trained & {target[symbol][0] for symbol in held_out if symbol in target}


@needs("cataclysm-dda", "imagenet-names")
def test_the_real_catalogue() -> None:
    pairs = list(corpora.cataclysm_pairs("zh_CN"))
    assert len(pairs) > 30_000
    assert not any("%s" in text or "<color" in text for pair in pairs for text in pair[:2])
