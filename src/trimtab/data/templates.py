"""Sentence templates around class names: "a photo of a {}". (Learned tokens are prompts, not templates.)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from trimtab.errors import RecipeError
from trimtab.scripts import is_han, is_kana, is_latin

_BARE_NAME = "{}"
# The lists run in parallel: each template of one language translates that of the other at the same place.
DEFAULT_TEMPLATES: dict[str, list[str]] = {
    "en": [
        "a photo of a {}",
        "a picture of a {}",
        "this is a photo of a {}",
        "a close-up photo of a {}",
        "a clear photo of a {}",
        "a bright photo of a {}",
        "a color photo of a {}",
        "there is a {} in this picture",
    ],
    "zh": [
        "一张{}的照片",
        "一幅{}的图片",
        "这是一张{}的照片",
        "一张{}的特写照片",
        "一张清晰的{}的照片",
        "一张明亮的{}的照片",
        "一张{}的彩色照片",
        "这张图片里有{}",
    ],
}


def check_template(template: str) -> str:
    """Return the template if it has exactly one `{}`.

    Raises:
        RecipeError: otherwise.
    """
    if (count := template.count("{}")) != 1:
        raise RecipeError(
            f"template {template!r} has {count} places for the class name; it needs exactly one {{}}, "
            f"as in {DEFAULT_TEMPLATES['en'][0]!r}"
        )
    return template


def fill(template: str, name: str) -> str:
    """Put a name into a template; other braces, in either, stay as they are.

    Raises:
        RecipeError: when the template has not exactly one `{}`.
    """
    return check_template(template).replace("{}", name)


def fill_all(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Every name in every template: names x templates texts, those of one name side by side.

    Raises:
        RecipeError: when there is no template, or one has not exactly one `{}`.
    """
    if not templates:
        raise RecipeError("no template given; it needs at least one, and '{}' stands for the bare name")
    for template in templates:
        check_template(template)
    return [template.replace("{}", name) for name in names for template in templates]


def templates_for(language: str) -> list[str]:
    """Default templates of a language tag ("zh-CN" gives those of "zh").

    Raises:
        RecipeError: when there are none; the message names the languages that have some.
    """
    found = known_language(language, DEFAULT_TEMPLATES)
    if found is None:
        raise RecipeError(
            f"no default templates for language {language!r} (known: {', '.join(DEFAULT_TEMPLATES)}): give your own"
        )
    return list(DEFAULT_TEMPLATES[found])


def known_language(tag: str, known: Collection[str]) -> str | None:
    """Which of `known` a language tag means: itself, or its language without country and script; None for neither."""
    return next((one for one in (tag, tag.replace("_", "-").split("-")[0]) if one in known), None)


def default_templates(names: Sequence[str], languages: Iterable[str] = ()) -> tuple[str, list[str]]:
    """Templates for class names by their script: English ones for Latin, Chinese for Han, else the bare name.

    The script of most names decides, so that "T恤" and "iPod" may stand in a Chinese list. Where any name has
    kana, names in Han count as Japanese.

    Args:
        languages: whose names may be in Latin script as English ones are. Where there are no templates for one of them,
            such names stand bare: English words around German ones do harm.

    Returns:
        whom they are for ("en", "zh" or "bare name"), and the templates.
    """
    japanese = any(map(is_kana, "".join(names)))
    votes: Counter[str] = Counter()
    for name in names:
        if is_latin(name):
            votes["en"] += 1
        else:
            han = all(is_han(letter) or is_latin(letter) for letter in name)
            votes["zh" if han and not japanese else "bare name"] += 1
    most = votes.most_common(1)[0][0] if votes else "bare name"
    if most == "en" and not all(known_language(tag, DEFAULT_TEMPLATES) for tag in languages):
        most = "bare name"
    return most, list(DEFAULT_TEMPLATES.get(most, [_BARE_NAME]))


def default_context(names: Sequence[str]) -> str:
    """What stands before the name in the first default template that ends with it; the English one where none does."""
    _, templates = default_templates(names)
    ends = [template for template in (*templates, *DEFAULT_TEMPLATES["en"]) if template.endswith(_BARE_NAME)]
    return next(start for end in ends if (start := end.removesuffix(_BARE_NAME).strip()))
