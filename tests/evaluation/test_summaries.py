from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from table_model import TableModel
from trimtab.evaluation import Report, classify, render_html, render_markdown, retrieve
from trimtab.evaluation.blocks import Details, Text, as_cell
from trimtab.evaluation.classification import classify_embeddings
from trimtab.evaluation.summaries import (
    class_errors,
    five_row_table,
    notes,
    ratio_to_english,
    recall_bars,
    reproducibility,
    score,
    score_rows,
    skipped_images,
)


def rows() -> list[dict[str, Any]]:
    found = []
    values = {"english_base": 40.0, "target_raw": 4.0, "adapted_target": 30.0, "adapted_english": 38.0}
    for name, value in values.items():
        found.append({"row": name, "dataset": "photos", "metric": "mR", "value": value})
        found.append({"row": name, "dataset": "names", "metric": "top1", "value": value / 2})
        for way in ("i2t", "t2i"):
            for k in (1, 5, 10):
                metric = f"{way} R@{k}"
                found.append({"row": name, "dataset": "photos", "metric": metric, "value": value + k})
    return found


def test_results_become_rows_and_come_back() -> None:
    model = TableModel({"x": [1, 0, 0], "y": [0, 1, 0]}, {"a": [1, 0, 0], "b": [1, 0, 0]})

    class Pairs:
        images = ("x", "y")
        texts = ("a", "b")
        positives = ((0, 0), (1, 1))

    found = score_rows("target_raw", "photos", retrieve(model, Pairs()))
    found += score_rows("target_raw", "names", classify(model, [("x", 0)], ["a"], ["{}"]))
    found = json.loads(json.dumps(found))
    assert [row["metric"] for row in found] == [
        "mR", "i2t R@1", "i2t R@5", "i2t R@10", "t2i R@1", "t2i R@5", "t2i R@10", "top1", "top5",
    ]  # fmt: skip
    assert score(found, "target_raw", "photos", "i2t R@1") == 0.0
    assert score(found, "target_raw", "names", "top1") == 100.0
    assert score(found, "adapted_target", "names", "top1") is None


def test_the_five_rows() -> None:
    table = five_row_table(rows(), language="Chinese", missing={"translation": "no translator"})
    assert [(column.group, column.label) for column in table.columns[1:]] == [("photos", "mR"), ("names", "top-1")]
    assert [as_cell(row.cells[0]).value for row in table.rows] == [
        "English, base model", "Chinese, base model", "Translated, base model", "Chinese, adapted",
        "English, adapted",
    ]  # fmt: skip
    assert table.rows[2].empty == "not available here: no translator"
    adapted, kept = as_cell(table.rows[3].cells[1]), as_cell(table.rows[4].cells[1])
    assert (adapted.value, adapted.note, table.rows[3].strong) == (30.0, "75% of English", True)
    # English lost more than two percent: marked.
    assert (kept.note, kept.tone) == ("95% of English", "caution")
    assert as_cell(table.rows[0].cells[1]).note == ""


def test_ratio_needs_a_reference() -> None:
    assert ratio_to_english(rows(), "adapted_target", "photos", "mR") == pytest.approx(75)
    assert ratio_to_english(rows()[2:], "adapted_target", "absent", "mR") is None
    zero = [
        {"row": "english_base", "dataset": "d", "metric": "mR", "value": 0.0},
        {"row": "adapted_target", "dataset": "d", "metric": "mR", "value": 1.0},
    ]
    assert ratio_to_english(zero, "adapted_target", "d", "mR") is None


def test_recall_bars_leave_out_rows_without_figures() -> None:
    bars = recall_bars(rows(), "photos", language="Chinese")
    assert bars.series == [
        "English, base model", "Chinese, base model", "Chinese, adapted", "English, adapted",
    ]  # fmt: skip
    assert [panel.title for panel in bars.panels] == ["Text finds image", "Image finds text"]
    assert bars.panels[0].values[2] == [31.0, 35.0, 40.0]


def test_hardest_classes() -> None:
    model = TableModel(
        {"x": [1, 0, 0], "y": [2, 1, 0], "z": [0, 0, 1]}, {"猫": [1, 0, 0], "狗": [0, 1, 0], "牛": [0, 0, 1]}
    )
    result = classify(model, [("x", 0), ("y", 1), ("z", 2)], ["猫", "狗", "牛"], ["{}"])
    table = class_errors(json.loads(json.dumps(result.as_json())))
    assert len(table.rows) == 1
    assert [as_cell(cell).value for cell in table.rows[0].cells] == ["狗", 1, 0.0, "猫"]
    assert as_cell(table.rows[0].cells[3]).note == "once"
    assert "1 of 3 classes" in table.note


def test_rare_confusions_of_hard_classes_are_told_too() -> None:
    classes = np.eye(61, dtype=np.float32)
    labels = np.array([*range(60), *range(60), 60])
    looks_like = np.array([*range(1, 60), 0, *range(1, 60), 0, 7])
    result = classify_embeddings(classes[looks_like], classes, labels)
    found = result.as_json()
    assert len(found["confusions"]) == 50
    [row] = [row for row in class_errors(found, result.confusions(), limit=61).rows if row.cells[0] == "60"]
    assert (as_cell(row.cells[3]).value, as_cell(row.cells[3]).note) == ("7", "once")


def test_skipped_images_and_notes_are_absent_when_there_are_none() -> None:
    assert skipped_images([]) is None
    assert notes([]) is None
    many = skipped_images([{"source": f"{at}.jpg", "reason": "cut off"} for at in range(300)], limit=200)
    assert isinstance(many, Details)
    assert many.title == "Pictures left out: 300"
    assert many.blocks[0].note == "and 100 more; the JSON of the evaluation has all"  # type: ignore[union-attr]
    one, two = notes(["only\none"]), notes(["first", "second"])
    assert isinstance(one, Text)
    assert isinstance(two, Text)
    assert (one.text, two.text) == ("only one", "- first\n- second")


def test_all_of_it_renders() -> None:
    sections = [
        five_row_table(rows(), language="Chinese", title="Five rows"),
        recall_bars(rows(), "photos", language="Chinese", title="Recall"),
        reproducibility({"seed": 17}, command="trimtab adapt x.yaml", recipe="link: language\n"),
    ]
    report = Report("t", sections=sections)
    for rendered in (render_html(report), render_markdown(report)):
        assert "Translated, base model" in rendered
        assert "trimtab adapt x.yaml" in rendered
        assert "link: language" in rendered
