"""Moved bases and students are written into adapted folders, once they are known to be the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny_models
import trimtab
from tiny_links import save_language, save_tiny_domain, save_tiny_prompt
from trimtab.cli import app
from trimtab.errors import ModelError
from trimtab.recipes.relocate import relocate
from trimtab.towers.text_encoder import TextEncoder

TEXTS = ["a red car", "一只红色的猫"]


@pytest.fixture
def places(tiny_folder: Any, tmp_path: Path) -> dict[str, Path]:
    """A base and a student of this test's own."""
    found = {"base": tmp_path / "models/base", "student": tmp_path / "models/student"}
    shutil.copytree(tiny_folder("clip"), found["base"])
    shutil.copytree(tiny_folder("xlm-roberta"), found["student"])
    return found


def moved(places: dict[str, Path], where: Path) -> dict[str, Path]:
    """The models, moved to a folder that is not beside the adapted one, under other names."""
    where.mkdir()
    return {role: Path(shutil.move(path, where / f"new-{role}")) for role, path in places.items()}


def names(folder: Path, file: str = "adapter.json") -> dict[str, str]:
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    return {role: content[role]["name"] for role in ("base", "student") if content.get(role)}


def test_a_language_link_finds_its_models_again(places: dict[str, Path], tmp_path: Path) -> None:
    base = trimtab.load(places["base"], device="cpu")
    folder = save_language(tmp_path / "chinese", base, TextEncoder.load(str(places["student"]), device="cpu"))
    before = trimtab.load(folder, device="cpu").encode_text(TEXTS)
    kept = (folder / "adapter.safetensors").read_bytes()
    now = moved(places, tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"trimtab relocate .*chinese --base"):
        trimtab.load(folder, device="cpu")
    outcome = CliRunner().invoke(
        app, ["relocate", str(folder), "--base", str(now["base"]), "--student", str(now["student"])]
    )
    assert outcome.exit_code == 0, outcome.output
    assert names(folder) == {role: str(place) for role, place in now.items()}
    assert np.array_equal(trimtab.load(folder, device="cpu").encode_text(TEXTS), before)
    assert (folder / "adapter.safetensors").read_bytes() == kept


def test_one_place_leaves_the_other(places: dict[str, Path], tmp_path: Path) -> None:
    base = trimtab.load(places["base"], device="cpu")
    folder = save_language(tmp_path / "chinese", base, TextEncoder.load(str(places["student"]), device="cpu"))
    other = shutil.copytree(places["student"], tmp_path / "copy")
    relocate(folder, student=other)
    assert names(folder) == {"base": str(places["base"]), "student": str(other)}


def test_a_composed_folder_is_told_as_a_whole(places: dict[str, Path], tmp_path: Path) -> None:
    base = trimtab.load(places["base"], device="cpu")
    language = save_language(tmp_path / "chinese", base, TextEncoder.load(str(places["student"]), device="cpu"))
    domain = save_tiny_domain(tmp_path / "products", base)
    prompt = save_tiny_prompt(tmp_path / "prompt", trimtab.load(domain, device="cpu"))
    model = trimtab.load(places["base"], links=[language, domain, prompt], device="cpu")
    folder = model.save_pretrained(tmp_path / "all")
    before = model.encode_text(TEXTS)
    own = names(folder / "prompt")
    now = moved(places, tmp_path / "elsewhere")
    relocate(folder, **now)
    assert names(folder, "composed.json")["base"] == str(now["base"])
    assert names(folder / "domain")["base"] == str(now["base"])
    assert names(folder / "prompt") == own, "prompts were trained on the domain's folder, not on the base"
    again = trimtab.load(folder, device="cpu")
    assert np.array_equal(again.encode_text(TEXTS), before)


def test_other_models_are_refused_and_nothing_is_written(places: dict[str, Path], tmp_path: Path) -> None:
    base = trimtab.load(places["base"], device="cpu")
    folder = save_language(tmp_path / "chinese", base, TextEncoder.load(str(places["student"]), device="cpu"))
    kept = (folder / "adapter.json").read_bytes()
    twin = tiny_models.build_clip(tmp_path / "twin", seed=1)
    with pytest.raises(ModelError, match="was trained on the base"):
        relocate(folder, base=twin)
    with pytest.raises(ModelError, match="unknown model"):
        relocate(folder, student=tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"say where the models of .*chinese are now"):
        relocate(folder)
    with pytest.raises(ModelError, match="neither an adapted nor a composed folder"):
        relocate(places["base"], base=twin)
    with pytest.raises(ModelError, match="no language link"):
        relocate(save_tiny_domain(tmp_path / "products", base), student=places["student"])
    assert (folder / "adapter.json").read_bytes() == kept
