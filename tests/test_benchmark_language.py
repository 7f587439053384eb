"""The benchmarks of the language link find their committed runs, and erase none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.config import load_recipe, to_mapping
from trimtab.errors import RecipeError
from trimtab.evaluation.ranking import Ranks

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import language_names  # noqa: E402
import language_seeds  # noqa: E402
import language_study  # noqa: E402

BUDGET = ["training.epochs=1", "data.epoch_pairs=60000", "training.trackers=[]"]


def recipe(name: str) -> dict[str, Any]:
    """That of the file's documented command."""
    if name == "language_study":
        return to_mapping(load_recipe(language_study.RECIPE, BUDGET))
    return language_seeds.without_seed(language_seeds.quickstart_recipe(Path("runs")))


@pytest.mark.parametrize("name", ["language_study", "language_seeds"])
def test_committed_runs_are_those_of_the_recipe_as_it_is(name: str) -> None:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    assert language_study.finished_runs(path, recipe(name)) == json.loads(path.read_text(encoding="utf-8"))["runs"]


def test_keys_that_are_younger_than_the_runs_had_their_defaults(tmp_path: Path) -> None:
    now = recipe("language_study")
    older = json.loads(json.dumps(now))
    del older["training"]["validate_every"]
    path = tmp_path / "runs.json"
    path.write_text(json.dumps({"recipe": older, "runs": [{"seed": 0}]}), encoding="utf-8")
    assert language_study.finished_runs(path, now) == [{"seed": 0}]
    changed = to_mapping(load_recipe(language_study.RECIPE, [*BUDGET, "training.validate_every=2"]))
    with pytest.raises(RecipeError, match="another recipe"):
        language_study.finished_runs(path, changed)


def test_runs_of_another_recipe_are_refused_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.json"
    text = json.dumps({"recipe": recipe("language_study"), "runs": [{"seed": 0}]})
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["language_study", "--out", str(path), "--epochs", "3"])
    with pytest.raises(SystemExit, match=r"runs\.json has runs of another recipe or budget"):
        language_study.main()
    assert path.read_text(encoding="utf-8") == text
    assert language_study.finished_runs(tmp_path / "none.json", recipe("language_study")) == []


def test_names_are_known_by_their_english_whatever_case_and_article() -> None:
    found = language_names.stands_in(["red apple", "ice-cream", "pear"], ["A red apple.", "Ice cream", "pears"])
    assert found.tolist() == [True, True, False]
    ranks = Ranks(rows=np.array([1, 6, 2]), columns=np.array([1, 1, 11]))
    assert language_names.mean_recall(ranks, found) == pytest.approx(100 * (3 + 1 + 3 + 3) / 12)
    assert language_names.mean_recall(ranks, ~found) == pytest.approx(100 * 2 / 6)
