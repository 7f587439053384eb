from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiny_links import CLASSES, save_language, save_tiny_domain, save_tiny_prompt
from tiny_pictures import noisy
from trimtab import __version__
from trimtab.adapters.adapted import load_adapted
from trimtab.adapters.composing import load_composed
from trimtab.data.manifests import read_classification
from trimtab.data.templates import DEFAULT_TEMPLATES, default_templates
from trimtab.errors import DataError, ModelError, RecipeError, TrimtabError
from trimtab.evaluation import classify
from trimtab.files import write_text
from trimtab.recipes.evaluate import _prompts, evaluate_classification, evaluate_retrieval
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.text_encoder import TextEncoder

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColorModel:
    """Sees the mean colour of a picture and reads the first colour named in a text."""

    name, fingerprint, logit_scale = "colors", "f" * 64, 10.0

    def __init__(self) -> None:
        self.last_skipped: list[tuple[int, str, str]] = []
        self.texts: list[str] = []
        self.batch_sizes: list[int] = []

    def default_templates(self, names: Any) -> Any:
        return default_templates(names)

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


def test_copies_of_pictures_are_named(model: Any, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    for copy in ("torn", "again"):
        (data / f"pictures/{copy}.png").write_bytes((data / "pictures/red.png").read_bytes())
    rows = ["image,label", "pictures/red.png,red", "pictures/torn.png,blue", "pictures/again.png,red"]
    write_text(data / "items.csv", "\n".join([*rows, "pictures/gone.png,red"]) + "\n")
    assert evaluate_classification(model, data / "items.csv", data / "classes.txt")["n"] == 3
    told = caplog.text
    assert "1 of 3 test pictures are there under another class too" in told
    assert "red.png as 'red' and " in told
    assert "torn.png as 'blue'" in told
    assert "1 of 3 test pictures are copies of others of their class" in told


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
    for target in (items, classes):
        with pytest.raises(TrimtabError, match="it is a file that this evaluation reads; name another"):
            evaluate_classification("nowhere/nothing", items, classes, json_path=target)
    (tmp_path / "report.md").symlink_to(data / "pairs.csv")
    with pytest.raises(TrimtabError, match=r"report\.md: it is a file that this evaluation reads"):
        evaluate_retrieval("nowhere/nothing", data / "pairs.csv", report=tmp_path)
    with pytest.raises(TrimtabError, match="its name is too long"):
        evaluate_retrieval("nowhere/nothing", data / "pairs.csv", json_path=tmp_path / ("a" * 300))
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(TrimtabError, match="its links lead in a circle"):
        evaluate_retrieval("nowhere/nothing", data / "pairs.csv", json_path=tmp_path / "circle")
    if Path("/proc/self").exists():  # no folder can be made there, and the error is not one of permission
        with pytest.raises(TrimtabError, match="/proc/nowhere: no folder can be made there"):
            evaluate_retrieval("nowhere/nothing", data / "pairs.csv", json_path="/proc/nowhere/out.json")
    with pytest.raises(DataError, match="no such file"):
        evaluate_retrieval("nowhere/nothing", data / "no.csv")
    with pytest.raises(ModelError, match="no such folder"):
        evaluate_retrieval("nowhere/nothing", data / "pairs.csv")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX pipe")
def test_results_go_into_pipes(model: Any, data: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        result = evaluate_retrieval(model, data / "pairs.csv", json_path=pipe)
        assert json.loads(read.result(10)) == result


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


def test_the_report_lists_texts_that_do_not_find_their_picture(model: Any, data: Path, tmp_path: Path) -> None:
    rows = "pictures/red.png,a red one\npictures/red.png,so blue\npictures/green.png,a green one\n"
    write_text(data / "wrong.csv", f"image,text\n{rows}")
    evaluate_retrieval(model, data / "wrong.csv", report=tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "| so blue | 2 |" in text
    assert "| a red one |" not in text


def test_texts_that_the_report_has_no_room_for_are_counted(model: Any, data: Path, tmp_path: Path) -> None:
    lost = "".join(f"pictures/missing.png,text {at}\n" for at in range(203))
    write_text(data / "many.csv", f"image,text\npictures/red.png,a red one\n{lost}")
    evaluate_retrieval(model, data / "many.csv", report=tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "Texts left out with their pictures: 203" in text
    assert "text 199" in text
    assert "text 200" not in text
    assert "and 3 more" in text


def test_a_perfect_result_has_a_report_too(model: Any, data: Path, tmp_path: Path) -> None:
    write_text(data / "items.csv", "image,label\npictures/red.png,red\n")
    evaluate_classification(model, data / "items.csv", data / "classes.txt", report=tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "100.0" in text
    assert "confusions" not in text


def test_the_device_is_the_one_asked_for(data: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("trimtab.adapters.adapted.load", lambda name, *, device: asked.append(device) or model)
    evaluate_classification("m", data / "items.csv", data / "classes.txt", device="meta")
    evaluate_classification("m", data / "items.csv", data / "classes.txt")
    assert asked == ["meta", "auto"]


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


# Models with prompts


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Twelve pictures of noise with the classes of the tiny prompts in turn, and one that cannot be read."""
    for number in range(12):
        noisy(np.full((40, 40, 3), 20 * number), number, 100).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    numbers = ["bad", *range(12)]
    rows = [f"{number}.png,{CLASSES[at % len(CLASSES)]}" for at, number in enumerate(numbers)]
    write_text(tmp_path / "items.csv", "\n".join(["image,label", *rows]) + "\n")
    return tmp_path / "items.csv"


def prompted(kind: str, base: DualEncoder, folder: Path) -> Any:
    if kind != "composed":
        return load_adapted(save_tiny_prompt(folder / "prompt", base, instance=kind == "instance"), base=base)
    domain = save_tiny_domain(folder / "domain", base)
    prompt = save_tiny_prompt(folder / "prompt", load_adapted(domain, base=base))
    return load_composed([domain, prompt], base=base)


@pytest.mark.parametrize("kind", ["context", "instance", "composed"])
def test_prompts_score_as_their_classifier_does(
    kind: str, tiny_base: Callable[[str], Any], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.evaluation.classification._SCORES_AT_ONCE", 5 * len(CLASSES))  # several parts
    model, names = prompted(kind, tiny_base("clip"), tmp_path), list(reversed(CLASSES))
    result = evaluate_classification(model, labelled, names, report=tmp_path / "report")
    pictures = [labelled.parent / f"{number}.png" for number in range(12)]
    truth = np.array([names.index(CLASSES[(number + 1) % len(CLASSES)]) for number in range(12)])
    found = model.classifier(names).scores(pictures).argmax(axis=1)
    assert result["top1"] == pytest.approx(100 * np.mean(found == truth))
    each = [100 * np.mean(found[truth == at] == at) for at in range(len(names))]
    assert result["mean_per_class"] == pytest.approx(np.mean(each))
    wrong = {(names[true], names[taken]) for true, taken in zip(truth, found) if true != taken}
    assert {(cell["class"], cell["taken_for"]) for cell in result["confusions"]} == wrong
    assert (result["n"], [item["source"] for item in result["skipped"]]) == (12, ["bad.png"])
    assert (result["templates_for"], result["templates"]) == ("prompts", [])
    assert "Classification by prompts" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    given = evaluate_classification(model, labelled, names, templates=["a {}"])
    assert (given["templates_for"], given["templates"]) == ("given", ["a {}"])
    direct = classify(model, read_classification(labelled, names), names, ["a {}"])
    assert (given["top1"], given["mistakes"][0]["margin"]) == (direct.top1, round(direct.mistakes[0].margin, 4))


def test_names_that_no_prompt_scores_are_zero_shot(
    tiny_base: Callable[[str], Any], tiny_folder: Callable[[str], Path], labelled: Path, tmp_path: Path
) -> None:
    base, student = tiny_base("clip"), TextEncoder.load(tiny_folder("bert"), device="cpu")
    language = save_language(tmp_path / "zh", base, student)
    model = load_composed([language, save_tiny_prompt(tmp_path / "prompt", base)], base=base, student=student)
    new = evaluate_classification(model, labelled, [*CLASSES, "茶"])
    assert (new["templates_for"], new["n_classes"]) == ("prompts", 4)
    write_text(tmp_path / "zh.csv", "image,label\n0.png,茶\n1.png,花\n")
    chinese = evaluate_classification(model, tmp_path / "zh.csv", ["茶", "花"])
    assert (chinese["templates_for"], chinese["templates"]) == ("zh", DEFAULT_TEMPLATES["zh"])


def test_pictures_that_prompts_cannot_read(tiny_base: Callable[[str], Any], labelled: Path, tmp_path: Path) -> None:
    for number in range(12):
        (labelled.parent / f"{number}.png").unlink()
    with pytest.raises(DataError, match="none of the 13 images can be read"):
        evaluate_classification(prompted("instance", tiny_base("clip"), tmp_path), labelled, CLASSES)


def test_names_that_prompts_were_not_trained_on_are_told(
    tiny_base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_base("clip")
    model = load_adapted(save_tiny_prompt(tmp_path / "prompt", base), base=base)
    assert _prompts(model, ["cat", "Dog", "red_car"]) is not None
    assert not caplog.records
    assert _prompts(model, ["cat", "Dog", "lorry"]) is not None
    assert "1 of 3 classes are none of those that the prompts were trained on, 'lorry' for one" in caplog.text
