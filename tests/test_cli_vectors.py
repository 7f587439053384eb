"""Compose, embed, index, search and export from the command line, one after the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from tiny_links import save_language, save_tiny_domain
from trimtab.cli import app
from trimtab.towers.text_encoder import TextEncoder

pytest.importorskip("faiss")


def run(*arguments: Any, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def composed(tiny_base: Callable[[str], Any], tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    base = tiny_base("clip")
    language = save_language(tmp_path / "zh", base, TextEncoder.load(tiny_folder("bert"), device="cpu"))
    domain = save_tiny_domain(tmp_path / "shop", base)
    assert "fingerprint" in run("compose", base.name, language, domain, "--out", tmp_path / "both")
    return tmp_path / "both"


def test_from_a_folder_of_pictures_to_chinese_search(
    composed: Path, pictures: list[Image.Image], tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for at, picture in enumerate(pictures):
        picture.save(photos / f"{at}.png")
    (photos / "bad.png").write_bytes(b"no picture")
    told = run("embed", photos, "--model", composed, "--out", tmp_path / "e", "--shard-size", 2, "--device", "cpu")
    assert "bad.png: not an image" in told
    assert "skipped.csv" in told
    told = run("index", tmp_path / "e", "--out", tmp_path / "i")
    assert "recall@" in told
    assert "flat" in told
    told = run("search", "一只猫", "--index", tmp_path / "i", "-k", 3)
    assert told.count(".png") == 3
    told = run("search", "--image", photos / "2.png", "--index", tmp_path / "i", "--model", composed, "--top", 1)
    assert "2.png" in told
    assert "1.000" in told
    told = run("search", "a cat", "--index", tmp_path / "i", "--model", tiny_folder("clip"), code=2)
    assert "another model" in told
    told = run("info", composed)
    assert "domain, language" in told


def test_a_relative_model_is_found_from_another_folder(
    tiny_folder: Callable[[str], Path],
    pictures: list[Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    pictures[0].save("photos/0.png")
    shutil.copytree(tiny_folder("clip"), "model")
    run("embed", "photos", "--model", "model", "--out", "e", "--device", "cpu")
    run("index", "e", "--out", "i")
    about = json.loads(Path("i/index.json").read_text(encoding="utf-8"))
    assert (about["model"]["name"], about["model"]["place"]) == ("model", str(tmp_path / "model"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "0.png" in run("search", "a cat", "--index", "../i")
    shutil.copytree(tiny_folder("siglip"), "model")  # the name comes first, and the fingerprint tells
    assert "another model" in run("search", "a cat", "--index", "../i", code=2)
    # Older indexes name no place.
    monkeypatch.chdir(tmp_path)
    del about["model"]["place"]
    Path("i/index.json").write_text(json.dumps(about), encoding="utf-8")
    assert "0.png" in run("search", "a cat", "--index", "i")


def test_texts_of_users_are_no_markup(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("text,price [/kg],price [eur]\na cat,[red]3,[/]\n", encoding="utf-8")
    clip = tiny_folder("clip")
    keep = [option for name in ("price [/kg]", "price [eur]") for option in ("--keep", name)]
    run("embed", table, "--of", "texts", "--model", clip, "--out", tmp_path / "e", *keep)
    run("index", tmp_path / "e", "--out", tmp_path / "i")
    told = run("search", "a cat", "--index", tmp_path / "i")
    assert all(word in told for word in ("price [/kg]", "price [eur]", "[red]3", "[/]"))


def test_texts_of_users_do_not_steer_the_terminal(
    tiny_folder: Callable[[str], Path], pictures: list[Image.Image], tmp_path: Path
) -> None:
    steering = "\x1b[2J\x07\u202e"
    clip, table, photos = tiny_folder("clip"), tmp_path / "t.csv", tmp_path / "photos"
    table.write_text(f"text,price {steering}\na cat,{steering}3\n", encoding="utf-8")
    photos.mkdir()
    pictures[0].save(photos / "a.png")
    (photos / f"{steering}.jpg").write_text("no picture")
    told = run("embed", photos, "--model", clip, "--out", tmp_path / "p")
    assert "left out" in told
    keep = ("--keep", f"price {steering}")
    told += run("embed", table, "--of", "texts", "--model", clip, "--out", tmp_path / "e", *keep)
    run("index", tmp_path / "e", "--out", tmp_path / "i")
    told += run("search", "a cat", "--index", tmp_path / "i")
    assert "price \N{REPLACEMENT CHARACTER}[2J" in told
    assert not set(told) & set("\x1b\x07\u202e")


def test_not_all_of_very_many_skipped_items_are_said_to_be_listed(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serve.store._LISTED", 2)
    table = tmp_path / "t.csv"
    table.write_text("text,note\na cat,x\n" + ",x\n" * 3, encoding="utf-8")
    told = run("embed", table, "--of", "texts", "--model", tiny_folder("clip"), "--out", tmp_path / "e")
    assert "2 of them are listed in" in told
    assert len((tmp_path / "e" / "skipped.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_parts_by_the_command_line(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\na cat\na dog\ntwo apples\n", encoding="utf-8")
    given = ["embed", tmp_path / "t.csv", "--model", tiny_folder("clip"), "--out", tmp_path / "e", "--shard-size", 1]
    assert "left to other parts" in run(*given, "--part", "1/2")
    assert "left to other parts" not in run(*given, "--part", "2/2")
    assert "of the form 1/4" in run(*given, "--part", "half", code=2)


def test_export(tiny_folder: Callable[[str], Path], composed: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert "image.onnx" in run("export", composed, "--out", tmp_path / "onnx")
    assert "cannot be merged" in run("export", composed, "--format", "merged", "--out", tmp_path / "m", code=2)
    assert "CLIPModel" in run("export", tiny_folder("clip"), "--format", "merged", "--out", tmp_path / "plain")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "--index", "i"], "give a text or --image"),
        (["search", "猫", "--image", "a.png", "--index", "i"], "give a text or --image"),
        (["search", "猫", "--index", "gone"], "gone: no such folder; `trimtab index` makes one"),
        (["search", "猫", "--index", "."], "has no index.json; name a folder that `trimtab index` wrote"),
        (["index", "gone", "--out", "i"], "gone: no such folder; `trimtab embed` makes one"),
        (["index", ".", "--out", "i"], "has no embeddings.json; name a folder that `trimtab embed` wrote"),
        (["compose", "starter", "--out", "c"], "at least one adapted folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in " ".join(run(*arguments, code=2).split())
