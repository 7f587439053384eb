from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data.templates import (
    DEFAULT_TEMPLATES,
    check_template,
    default_context,
    default_templates,
    fill,
    fill_all,
    templates_for,
)
from trimtab.errors import RecipeError


def test_defaults_are_parallel_and_sound() -> None:
    assert len({len(templates) for templates in DEFAULT_TEMPLATES.values()}) == 1
    for language, templates in DEFAULT_TEMPLATES.items():
        assert len(set(templates)) == len(templates) >= 8
        assert all(check_template(template).isascii() == (language == "en") for template in templates)


@given(st.text(max_size=20))
def test_names_go_in_as_they_are(name: str) -> None:
    assert fill("一张{}的照片", name) == f"一张{name}的照片"


def test_other_braces_stay() -> None:
    assert fill("{x} {} {0}", "{a}") == "{x} {a} {0}"


@pytest.mark.parametrize("template", ["", "a photo", "{} and {}", "{0}", "a {name}"])
def test_templates_need_exactly_one_place(template: str) -> None:
    with pytest.raises(RecipeError, match=r"exactly one \{\}"):
        fill(template, "dog")
    with pytest.raises(RecipeError, match=r"exactly one \{\}"):
        fill_all(["a {}", template], ["dog"])


def test_fill_all_keeps_names_together() -> None:
    assert fill_all(["{}", "a {}"], ["dog", "cat"]) == ["dog", "a dog", "cat", "a cat"]
    with pytest.raises(RecipeError, match="no template"):
        fill_all([], ["dog"])


def test_names_stand_bare_that_may_be_of_a_language_without_templates() -> None:
    assert default_templates(["Hund", "Katze"], ["de"]) == ("bare name", ["{}"])
    assert default_templates(["dog"], ["zh", "de"])[0] == "bare name"
    assert default_templates(["dog"], ["zh-CN"])[0] == "en", "Chinese names are in a script of their own"
    assert default_templates(["狗"], ["zh", "de"])[0] == "zh"


def test_templates_for_language_tags() -> None:
    assert templates_for("zh-Hans-CN") == templates_for("zh_TW") == DEFAULT_TEMPLATES["zh"]
    with pytest.raises(RecipeError, match=r"'de'.*en, zh"):
        templates_for("de")
    templates_for("en").append("changed")
    assert "changed" not in DEFAULT_TEMPLATES["en"]


@pytest.mark.parametrize(
    ("names", "language"),
    [
        (["cat", "café", "T-shirt 2"], "en"),
        (["猫", "狗"], "zh"),
        (["猫", "T恤", "iPod", "狗（大）", "卡尔·马克思", "𠮷"], "zh"),
        (["cat", "dog", "麻将"], "en"),
        (["犬", "猫", "ねこ"], "bare name"),
        (["犬", "猫", "アニメ"], "bare name"),
        (["кот", "собака"], "bare name"),
        (["고양이"], "bare name"),
        ([], "bare name"),
    ],
)
def test_the_script_of_the_names_chooses_templates(names: list[str], language: str) -> None:
    found, templates = default_templates(names)
    assert found == language
    assert templates == DEFAULT_TEMPLATES.get(language, ["{}"])


def test_a_context_ends_where_the_name_begins() -> None:
    assert default_context(["cat", "dog"]) == "a photo of a"
    assert default_context(["猫", "T恤"]) == "这张图片里有"
    assert default_context(["кот"]) == "a photo of a"  # no template is known
