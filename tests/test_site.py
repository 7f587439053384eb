"""The docs site: every page is reachable, and links out of docs/ get pages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import site_hooks  # noqa: E402


def pages(nav: Any) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages(value)


def test_every_page_is_in_the_menu_once() -> None:
    described = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(pages(described["nav"]))
    assert sorted(listed) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md"))


def test_names_in_the_api_page_exist() -> None:
    import importlib

    lines = (ROOT / "docs/api.md").read_text(encoding="utf-8").splitlines()
    names = [line.removeprefix("::: ") for line in lines if line.startswith("::: ")]
    assert names
    for name in names:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), name


def test_files_of_the_repository_get_pages() -> None:
    text = "See [the log](../CHANGELOG.md#top), [a recipe](../recipes/language-zh.yaml), [a page](language.md), " \
        "[elsewhere](https://example.org/x.py), [nothing](../nothing.py) and ![a picture](../README.md)."  # fmt: skip
    found = site_hooks.targets(text, ROOT / "docs")
    assert [path.name for path in found] == ["CHANGELOG.md", "language-zh.yaml"]
    assert site_hooks.page_of(found[1]) == "repository/recipes/language-zh.yaml.md"
    assert "```yaml\n" in site_hooks.shown(found[1])
    assert "](" not in site_hooks.shown(found[0])
