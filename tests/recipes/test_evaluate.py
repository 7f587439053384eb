from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trimtab import __version__
from trimtab.data.manifests import read_classification
from trimtab.data.templates import DEFAULT_TEMPLATES
from trimtab.errors import DataError, ModelError, RecipeError, TrimtabError
from trimtab.evaluation import classify
from trimtab.files import write_text
from trimtab.recipes.evaluate import evaluate_classification, evaluate_retrieval
from trimtab.towers.dual_encoder import DualEncoder

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColorModel:
    """Sees the mean colour of a picture and reads the first colour named in a text."""

    name, fingerprint, logit_scale = "colors", "f" * 64, 10.0

    def __init__(self) -> None:
        self.last_skipped: list[tuple[int, str, str]] = []
        self.texts: list[str] = []
        self.batch_sizes: list[int] = []

    def encode_image(self, images: Any, *, batch_size: int, on_error: str, progress: bool = False) -> np.ndarray:
        self.batch_sizes.append(batch_size)
        self.last_skipped, rows = [], []
        for at, path in enumerate(images):
            try:
                rows.append(np.asarray(Image.open(path).convert("RGB"), np.float32).mean(axis=(0, 1)))
            except OSError:
                self.last_skipped.append((at, str(path), "is no picture"))
        array = np.asarray(rows, np.float32).reshape(-1, 3) + 1
        return array / np.linalg.norm(array, axis=1, keepdims=True)

    def encode_text(self, texts: Any, *, progress: bool = False) -> np.ndarray:
        self.texts += texts
        rows = [next((color for name, color in COLORS.items() if name in text), (1, 1, 1)) for text in texts]
        array = np.asarray(rows, np.float32)
        return array / np.linalg.norm(array, axis=1, keepdims=True)


@pytest.fixture
def model() -> Any:
    return ColorModel()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three pictures, one of them wrongly labelled, their classes, and pairs."""
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(folder / "pictures" / f"{name}.png")
    write_text(folder / "classes.txt", "red\ngreen\nblue\n")
    write_text(
        folder / "items.csv",
        "image,label\npictures/red.png,red\npictures/green.png,green\npictures/blue.png,red\n",
    )
    write_text(
        folder / "pairs.csv",
        "image,text\npictures/red.png,a red one\npictures/red.png,so red\npictures/green.png,a green one\n"
        "pictures/blue.png,a red one\n",
    )
    return folder


def test_classification_counts_and_says_on_what(model: Any, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.json"
    result = evaluate_classification(model, data / "items.csv", data / "classes.txt", json_path=target)
    assert (result["top1"], result["top5"], result["n"]) == (pytest.approx(200 / 3), 100.0, 3)
    assert (result["model"], result["fingerprint"], result["version"]) == ("colors", "f" * 64, __version__)
    assert (result["templates_for"], result["templates"]) == ("en", DEFAULT_TEMPLATES["en"])
    assert result["manifest_sha256"] == hashlib.sha256((data / "items.csv").read_bytes()).hexdigest()
    assert result["seconds"] >= 0
    assert result["mistakes"] == [
        {"image": "pictures/blue.png", "class": "red", "taken_for": "blue", "margin": pytest.approx(0.99, abs=0.02)}
    ]
    assert json.loads(target.read_text(encoding="utf-8")) == result
    assert [path.name for path in target.parent.iterdir()] == ["out.json"]


def test_retrieval_counts_all_positives(model: Any, data: Path, tmp_path: Path) -> None:
    result = evaluate_retrieval(model, data / "pairs.csv", json_path=tmp_path / "out.json", batch_size=2)
    # Both red texts find the red picture first, the blue picture finds its text nowhere near the top.
    assert result["t2i"] == {"R@1": 100.0, "R@5": 100.0, "R@10": 100.0}
    assert result["i2t"]["R@1"] == pytest.approx(200 / 3)
    assert result["i2t"].keys() == {"R@1", "R@5", "R@10"}
    assert result["mR"] == pytest.approx((500 + 200 / 3) / 6)
    assert (result["n_images"], result["n_texts"], result["hubness"]) == (3, 3, "none")
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == result
    assert model.batch_sizes == [2]


def test_retrieval_names_its_correction(model: Any, data: Path) -> None:
    for hubness in ("csls", "dual_softmax"):
        assert evaluate_retrieval(model, data / "pairs.csv", hubness=hubness)["hubness"] == hubness  # type: ignore[arg-type]


def test_templates_are_used_and_recorded(model: Any, data: Path) -> None:
    templates = ["my {}", "{} thing"]
    result = evaluate_classification(model, data / "items.csv", ["red", "green", "blue"], templates=templates)
    assert (result["templates_for"], result["templates"]) == ("given", templates)
    assert model.texts == ["my red", "red thing", "my green", "green thing", "my blue", "blue thing"]


def test_pictures_may_lie_elsewhere(model: Any, data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "lists" / "items.csv"
    write_text(moved, (data / "items.csv").read_text())
    result = evaluate_classification(model, moved, data / "classes.txt", root=data)
    assert (result["n"], result["mistakes"][0]["image"]) == (3, "pictures/blue.png")


def test_bad_pictures_are_counted_and_named(model: Any, data: Path) -> None:
    (data / "pictures" / "red.png").write_bytes(b"nothing")
    (data / "pictures" / "blue.png").unlink()
    result = evaluate_classification(model, data / "items.csv", data / "classes.txt")
    assert (result["n"], result["top1"], result["n_skipped"]) == (1, 100.0, 2)
    assert [item["source"] for item in result["skipped"]] == ["pictures/red.png", "pictures/blue.png"]
    pairs = evaluate_retrieval(model, data / "pairs.csv")
    assert (pairs["n_images"], pairs["n_texts"], pairs["n_skipped"], pairs["n_lost_texts"]) == (1, 1, 2, 2)


def test_nothing_is_written_when_every_picture_is_bad(model: Any, data: Path, tmp_path: Path) -> None:
    for path in (data / "pictures").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"none of the 3 images can be read.*--root"):
        evaluate_classification(model, data / "items.csv", data / "classes.txt", json_path=tmp_path / "out.json")
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        evaluate_retrieval(model, data / "pairs.csv", json_path=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_what_cannot_work_fails_before_the_model_is_loaded(data: Path, tmp_path: Path) -> None:
    items, classes = data / "items.csv", data / "classes.txt"
    with pytest.raises(RecipeError, match="'my thing' has 0 places"):
        evaluate_classification("nowhere/nothing", items, classes, templates=["my thing"])
    with pytest.raises(RecipeError, match="no template"):
        evaluate_classification("nowhere/nothing", items, classes, templates=[])
    with pytest.raises(TrimtabError, match="is a folder; name a file in it"):
        evaluate_classification("nowhere/nothing", items, classes, json_path=tmp_path)
    with pytest.raises(TrimtabError, match=r"items\.csv: it is, or lies below, a file"):
        evaluate_classification("nowhere/nothing", items, classes, json_path=items / "out.json")
    with pytest.raises(TrimtabError, match="lies below, a file"):
        evaluate_retrieval("nowhere/nothing", data / "pairs.csv", report=items)
    if Path("/proc/self").exists():  # no folder can be made there, and the error is not one of permission
        with pytest.raises(TrimtabError, match="/proc/nowhere: no folder can be made there"):
            evaluate_retrieval("nowhere/nothing", data / "pairs.csv", json_path="/proc/nowhere/out.json")
    with pytest.raises(DataError, match="no such file"):
        evaluate_retrieval("nowhere/nothing", data / "no.csv")
    with pytest.raises(ModelError, match="no such folder"):
        evaluate_retrieval("nowhere/nothing", data / "pairs.csv")


def test_a_full_disk_does_not_lose_the_figures(
    model: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise TrimtabError("cannot write out.json: the disk is full")

    monkeypatch.setattr("trimtab.recipes.evaluate.write_json", full)
    with pytest.raises(TrimtabError, match=r'disk is full.*"top1": 66\.6.*"n": 3'):
        evaluate_classification(model, data / "items.csv", data / "classes.txt", json_path=tmp_path / "out.json")


def test_reports_show_the_hard_parts(model: Any, data: Path, tmp_path: Path) -> None:
    (data / "pictures" / "green.png").write_bytes(b"nothing")
    evaluate_classification(model, data / "items.csv", data / "classes.txt", report=tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    for part in ("Top-1", "50.0", "Hardest classes", "Most frequent confusions", "blue", "pictures/green.png", "fff"):
        assert part in text
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/") == 1  # the confident mistake
    evaluate_retrieval(model, data / "pairs.csv", report=tmp_path / "retrieval", hubness="csls")
    text = (tmp_path / "retrieval" / "report.md").read_text(encoding="utf-8")
    for part in ("mR", "R@10", "Text finds image", "csls", "pictures/green.png", "a green one"):
        assert part in text


def test_a_perfect_result_has_a_report_too(model: Any, data: Path, tmp_path: Path) -> None:
    write_text(data / "items.csv", "image,label\npictures/red.png,red\n")
    evaluate_classification(model, data / "items.csv", data / "classes.txt", report=tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "100.0" in text
    assert "confusions" not in text


def test_a_folder_and_its_loaded_model_give_the_same(
    tiny_folder: Callable[[str], Path], tiny_base: Callable[[str], Any], data: Path
) -> None:
    base: DualEncoder = tiny_base("clip")
    items, names = data / "items.csv", ["red", "green", "blue"]
    by_folder = evaluate_classification(tiny_folder("clip"), items, names, device="cpu", templates=["{}"])
    by_object = evaluate_classification(base, items, names, templates=["{}"])
    direct = classify(base, read_classification(items, names), names, ["{}"])
    assert by_folder["fingerprint"] == by_object["fingerprint"] == base.fingerprint
    assert by_folder["top1"] == by_object["top1"] == direct.top1
    assert by_folder["mistakes"] == by_object["mistakes"]
