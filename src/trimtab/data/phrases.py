"""Phrases made of a dictionary's nouns: "two red apples", "an apple on a table", on both sides at once.

A dictionary teaches words in isolation, yet people describe pictures in phrases. Nouns of visible things are put
into patterns that exist in both languages, so that the pair stays an exact translation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trimtab.data.templates import known_language
from trimtab.errors import RecipeError


@dataclass(frozen=True)
class Grammar:
    """Patterns of one language beside English. Slots: {n}, {m} nouns (plain), {a}, {b} the same with an article
    in English, {ns} plural in English, {q} a quality, {c} a count, {p} a place.
    """

    patterns: tuple[tuple[str, str], ...]
    qualities: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, str], ...]
    places: tuple[tuple[str, str], ...]
    endings: tuple[tuple[str, str], ...]


GRAMMARS: dict[str, Grammar] = {
    "zh": Grammar(
        patterns=(
            ("{a}", "{n}"),
            ("{a}", "一个{n}"),
            ("{a}", "一只{n}"),
            ("the {n}", "这个{n}"),
            ("{ns}", "{n}"),
            ("{c} {ns}", "{c}个{n}"),
            ("{c} {ns}", "{c}只{n}"),
            ("a photo of {a}", "一张{n}的照片"),
            ("a photo of {a}", "{n}的照片"),
            ("a picture of {a}", "一幅{n}的图片"),
            ("a close-up photo of {a}", "{n}的特写照片"),
            ("a drawing of {a}", "一幅画着{n}的画"),
            ("a cartoon {n}", "卡通{n}"),
            ("this is {a}", "这是{n}"),
            ("there is {a} in this picture", "这张图片里有{n}"),
            ("{q:a} {n}", "{q}{n}"),
            ("{q:a} {n}", "一个{q}{n}"),
            ("{q:a} {n}", "一只{q}{n}"),
            ("a photo of {q:a} {n}", "一张{q}{n}的照片"),
            ("{c} {q} {ns}", "{c}个{q}{n}"),
            ("{a} and {b}", "{n}和{m}"),
            ("{a} with {b}", "{n}与{m}"),
            ("{a} next to {b}", "{m}旁边的{n}"),
            ("{a} {p}", "{p}的{n}"),
            ("{q:a} {n} {p}", "{p}的{q}{n}"),
            ("a baby {n}", "{n}宝宝"),
            ("a person with {a}", "带着{n}的人"),
            ("another {n}", "另一个{n}"),
            ("the head of {a}", "{n}的头"),
            ("a group of {ns}", "一群{n}"),
            ("a toy {n}", "玩具{n}"),
            ("a part of {a}", "{n}的一部分"),
        ),
        qualities=(
            ("red", "红色的"),
            ("red", "红"),
            ("green", "绿色的"),
            ("green", "绿"),
            ("blue", "蓝色的"),
            ("blue", "蓝"),
            ("yellow", "黄色的"),
            ("yellow", "黄"),
            ("white", "白色的"),
            ("white", "白"),
            ("black", "黑色的"),
            ("black", "黑"),
            ("brown", "棕色的"),
            ("orange", "橙色的"),
            ("pink", "粉红色的"),
            ("purple", "紫色的"),
            ("gray", "灰色的"),
            ("golden", "金色的"),
            ("silver", "银色的"),
            ("small", "小"),
            ("little", "小小的"),
            ("big", "大"),
            ("large", "大型"),
            ("old", "旧"),
            ("new", "新的"),
            ("beautiful", "美丽的"),
            ("cute", "可爱的"),
            ("round", "圆形的"),
            ("square", "方形的"),
            ("long", "长长的"),
            ("wooden", "木制的"),
            ("metal", "金属"),
            ("glass", "玻璃"),
            ("plastic", "塑料"),
            ("fresh", "新鲜的"),
            ("happy", "快乐的"),
            ("sleeping", "睡觉的"),
            ("flying", "飞行的"),
            ("running", "奔跑的"),
            ("broken", "破碎的"),
            ("sliced", "切片的"),
            ("open", "打开的"),
            ("closed", "关闭的"),
            ("wild", "野生的"),
            ("young", "年幼的"),
            ("colorful", "五颜六色的"),
            ("striped", "条纹"),
            ("smiling", "微笑的"),
            ("modern", "现代的"),
        ),
        counts=(
            ("two", "两"),
            ("three", "三"),
            ("four", "四"),
            ("five", "五"),
            ("many", "很多"),
            ("several", "几"),
        ),
        places=(
            ("on a table", "桌子上"),
            ("in the water", "水里"),
            ("on the grass", "草地上"),
            ("in a tree", "树上"),
            ("in the sky", "天空中"),
            ("in a box", "盒子里"),
            ("on a plate", "盘子里"),
            ("in the snow", "雪地里"),
            ("on the street", "街上"),
            ("on a flower", "花朵上"),
            ("in a kitchen", "厨房里"),
            ("at the seaside", "海边"),
            ("in the forest", "森林里"),
            ("on a white background", "白色背景上"),
            ("in a shop", "商店里"),
            ("in a hand", "手里"),
        ),
        endings=(("", ""), ("", ""), (".", "。"), ("!", "！")),
    ),
}


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, by its first letter."""
    return f"{'an' if phrase[:1].lower() in 'aeiou' else 'a'} {phrase}"


def plural(noun: str) -> str:
    """The regular English plural of a noun phrase's last word."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun if noun.endswith("s") and not noun.endswith("ss") else noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def phrases(nouns: Sequence[tuple[str, str]], language: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield `count` pairs (target, English); every noun appears equally often, give or take one.

    Args:
        nouns: names of things as (target, English without article).
        language: its tag; "zh-CN" has the patterns of "zh".

    Raises:
        RecipeError: no grammar is known for the language.
    """
    known = known_language(language, GRAMMARS)
    if known is None:
        raise RecipeError(f"no phrase patterns for language {language!r}; there are some for {sorted(GRAMMARS)}")
    grammar = GRAMMARS[known]
    rng = random.Random(seed)
    for i in range(count if nouns else 0):
        if i % len(nouns) == 0:
            order = rng.sample(range(len(nouns)), len(nouns))
        yield _phrase(grammar, nouns[order[i % len(nouns)]], rng.choice(nouns), rng)


def _phrase(grammar: Grammar, noun: tuple[str, str], other: tuple[str, str], rng: random.Random) -> tuple[str, str]:
    english_pattern, target_pattern = rng.choice(grammar.patterns)
    quality, number, place = rng.choice(grammar.qualities), rng.choice(grammar.counts), rng.choice(grammar.places)
    ending = rng.choice(grammar.endings)
    english = (
        english_pattern.replace("{q:a}", article(quality[0]))
        .replace("{ns}", plural(noun[1]))
        .replace("{n}", noun[1])
        .replace("{a}", article(noun[1]))
        .replace("{b}", article(other[1]))
        .replace("{q}", quality[0])
        .replace("{c}", number[0])
        .replace("{p}", place[0])
    )
    target = (
        target_pattern.replace("{n}", noun[0])
        .replace("{m}", other[0])
        .replace("{q}", quality[1])
        .replace("{c}", number[1])
        .replace("{p}", place[1])
    )
    # A sentence with an end mark also starts with a capital, as captions do.
    english = english[:1].upper() + english[1:] + ending[0] if ending[0] else english
    return target + ending[1], english
