from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.towers.publishing import hide_places


def published(folder: Path, about: dict[str, Any], name: str = "adapter.json") -> dict[str, Any]:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about), encoding="utf-8")
    hide_places(folder)
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/models/clip", "/clip"),
        ("/home/me/models/clip/", "/clip"),
        ("C:\\Users\\me\\clip", "/clip"),
        ("\\\\server\\share\\me\\clip", "/clip"),
        ("D:/data/图.csv", "/图.csv"),
        ("/", "/"),
        ("starter", "starter"),
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("runs/clip", "runs/clip"),
        ("a photo of a {}", "a photo of a {}"),
        ("", ""),
    ],
)
def test_the_last_part_of_absolute_paths_is_left(tmp_path: Path, text: str, left: str) -> None:
    about = {"base": {"name": text}, "recipe": {"data": {"train": [{"path": text}]}}, "data": {text: {"pairs": 3}}}
    assert published(tmp_path, about) == {
        "base": {"name": left}, "recipe": {"data": {"train": [{"path": left}]}}, "data": {left: {"pairs": 3}}
    }  # fmt: skip


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    found = published(tmp_path, {"data": {"/a/x.csv": 1, "/b/x.csv": 2, "/c/x.csv": None}})
    assert found == {"data": {"/x.csv": 1, "/x.csv (2)": 2, "/x.csv (3)": None}}


def test_what_the_model_works_with_stays(tmp_path: Path) -> None:
    about = {
        "config": {"classes": ["/a/b"], "templates": ["/x/ {}"]},
        "tensors": {"/a/b": [1]},
        "aliases": {"/c/d": "e"},
    }
    assert published(tmp_path, about) == about


def test_links_of_a_composed_folder_too_and_no_other_file(tmp_path: Path) -> None:
    about: dict[str, Any] = {"base": {"name": "/home/me/clip"}}
    assert published(tmp_path, about, "composed.json") == {"base": {"name": "/clip"}}
    assert published(tmp_path, about, "language/adapter.json") == {"base": {"name": "/clip"}}
    assert published(tmp_path, {"model": {"vocab": {"/a/b": 7}}}, "tokenizer.json") == {"model": {"vocab": {"/a/b": 7}}}
