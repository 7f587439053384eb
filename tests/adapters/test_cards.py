from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trimtab.adapters.cards import card_head, shown_name


def test_the_hub_is_told_of_the_models_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    models = ["openai/clip-vit-base-patch32", "starter", "here/clip", str(tmp_path / "here/clip"), "../gone"]
    front = yaml.safe_load(card_head(["clip", "domain"], models=models, languages=["no"]).split("---")[1])
    assert front == {
        "library_name": "trimtab",
        "language": ["no"],
        "base_model": ["openai/clip-vit-base-patch32"],
        "base_model_relation": "adapter",
        "tags": ["clip", "domain"],
    }
    assert "base_model" not in card_head(["clip"], models=["starter", str(tmp_path)])


def test_a_card_names_no_place_on_a_machine(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    names = [shown_name(name) for name in (str(tmp_path / "clip"), "starter", "openai/clip-vit-base-patch32")]
    assert names == ["clip", "starter", "openai/clip-vit-base-patch32"]
