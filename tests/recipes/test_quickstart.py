"""The quickstart's own steps, on a tiny base, a tiny student and a handful of pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tiny_language import toy_pairs
from trimtab.config import recipe_from_mapping
from trimtab.data.pictures import Captioned
from trimtab.recipes import quickstart as module

WORDS = {"猫": "A cat.", "狗": "A dog.", "花": "A flower.", "车": "A car."}


@pytest.fixture
def small_quickstart(
    tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Path]:
    """Run the quickstart with everything big replaced; returns its folder."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    items = []
    for number, (target, english) in enumerate(WORDS.items()):
        path = tmp_path / "source" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (60 * number, 90, 200 - 40 * number)).save(path)
        items.append(Captioned(path, english, target))
    pairs = tmp_path / "pairs.csv"
    # The test words themselves are among the pairs: the quickstart has to keep them out.
    rows = [*toy_pairs(200), *((target, english) for target, english in WORDS.items())]
    pairs.write_text("target,english\n" + "\n".join(",".join(row) for row in rows), encoding="utf-8")

    def recipe(path: str | Path, overrides: list[str]) -> Any:
        mapping = {
            "link": "language",
            "base": str(tiny_folder("clip")),
            "student": str(tiny_folder("bert")),
            "data": {"train": [str(pairs)], "validation_size": 20},
            "adapter": {"width": 16, "heads": 2, "layers": 1},
            "training": {"epochs": 1, "batch_size": 32, "collapse_at": 1},
        }
        return recipe_from_mapping(mapping, "test", overrides)

    def pictures(*_: Any, **__: Any) -> Iterator[Captioned]:
        yield from items

    monkeypatch.setattr(module, "load_recipe", recipe)
    monkeypatch.setattr(module, "fetch", lambda key: tmp_path)
    monkeypatch.setattr(module, "tuxpaint_photos", lambda locale: items)
    monkeypatch.setattr(module, "openmoji_pictures", pictures)

    def run() -> Path:
        module.quickstart(tmp_path / "out")
        return tmp_path / "out"

    return run


def test_quickstart_leaves_everything_a_reader_needs(small_quickstart: Callable[[], Path]) -> None:
    out = small_quickstart()
    assert {path.name for path in (out / "language-zh").iterdir()} == {
        "adapter.safetensors",
        "adapter.json",
        "README.md",
    }
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = {(row["row"], row["dataset"], row["metric"]): row["value"] for row in results["language"]["rows"]}
    for name in ("english_base", "target_raw", "adapted_target", "adapted_english"):
        for dataset in ("tuxpaint", "openmoji"):
            assert 0 <= rows[name, dataset, "mR"] <= 100
    assert rows["adapted_english", "tuxpaint", "mR"] == rows["english_base", "tuxpaint", "mR"]
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "data:image/" in html
    assert "猫" in html
    assert "Retrieval on pictures" in (out / "report.md").read_text(encoding="utf-8")


def test_test_texts_are_kept_out_of_training(small_quickstart: Callable[[], Path]) -> None:
    results = json.loads((small_quickstart() / "results.json").read_text(encoding="utf-8"))
    assert results["counts"]["excluded as test texts"]["dropped"] >= len(WORDS)


def test_manifests_evaluate_on_their_own(small_quickstart: Callable[[], Path]) -> None:
    from trimtab.recipes.evaluate import evaluate_retrieval

    out = small_quickstart()
    result = evaluate_retrieval(out / "language-zh", out / "pictures" / "tuxpaint-zh.csv")
    assert result["n_images"] == len(WORDS)


def test_the_committed_recipe_is_found_and_loads(tmp_path: Path) -> None:
    recipe = module.quickstart_recipe(tmp_path)
    assert recipe.out == str(tmp_path / "language-zh")
    assert len(recipe.data.exclude) == 2
