"""Only pictures of the index that are inside the root are shown."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from tiny_server import png
from trimtab.serve.http import thumbnails as module
from trimtab.serve.http.problems import Problem
from trimtab.serve.http.thumbnails import SIDE, Thumbnails


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "inner").mkdir(parents=True)
    (folder / "large.png").write_bytes(png(size=(1000, 500)))
    (folder / "inner" / "图.png").write_bytes(png())
    (folder / "damaged.png").write_bytes(png()[:50])
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "around").symlink_to(tmp_path)
    return folder


def shown(root: Path, **items: str) -> Thumbnails:
    return Thumbnails(lambda id: {"id": id, "image": items[id]} if id in items else None, root)


def test_a_small_copy(root: Path) -> None:
    content = shown(root, a="large.png", b="inner/图.png").jpeg("a")
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("JPEG", (SIDE, SIDE // 2))
    assert shown(root, b="inner/图.png").jpeg("b")


@pytest.mark.parametrize(
    "place",
    [
        *("../secret.png", "link.png", "inner", "missing.png", "", ".", "a\0b", "http://a.example/x.png"),
        *("around/secret.png", "around\\secret.png", "..\\secret.png"),
        *("inner/../../secret.png", "x" * 5000, "damaged.png", "/etc/passwd", "file:///etc/passwd"),
    ],
)
def test_whatever_the_index_says_nothing_else_is_read(root: Path, place: str) -> None:
    with pytest.raises(Problem) as caught:
        shown(root, a=place).jpeg("a")
    assert caught.value.status == 404
    assert str(root) not in caught.value.message


def test_an_absolute_path_inside_is_fine_and_outside_is_not(root: Path) -> None:
    assert shown(root, a=str(root / "large.png")).jpeg("a")
    with pytest.raises(Problem):
        shown(root, a=str(root.parent / "secret.png")).jpeg("a")


@pytest.mark.parametrize("place", ["inner\\图.png", "inner/cafe\u0301.png"])
def test_paths_as_another_system_writes_them(root: Path, place: str) -> None:
    (root / "inner" / "caf\u00e9.png").write_bytes(png())
    assert shown(root, a=place).jpeg("a")


def test_items_that_the_index_does_not_have(root: Path) -> None:
    with pytest.raises(Problem):
        shown(root, a="large.png").jpeg("large.png")
    with pytest.raises(Problem):
        Thumbnails(lambda id: {"id": id, "text": "a text"}, root).jpeg("a")


def test_the_last_ones_stay_in_memory_up_to_a_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = shown(root, a="large.png", b="inner/图.png")
    first = small.jpeg("a")
    (root / "large.png").unlink()
    assert small.jpeg("a") == first
    monkeypatch.setattr(module, "_KEPT_BYTES", len(first))
    small.jpeg("b")
    with pytest.raises(Problem):
        small.jpeg("a")
