from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data.manifests import RetrievalPairs
from trimtab.evaluation import Report, render_html, render_markdown
from trimtab.evaluation.blocks import Cell, Table, TableRow, as_cell
from trimtab.evaluation.domain_summaries import (
    METHODS,
    Spread,
    alpha_lines,
    general_rows,
    general_table,
    method_table,
    spread,
    training_curves,
    training_rows,
    with_seed,
)
from trimtab.evaluation.forgetting import GeneralSet, LabelledPictures, forgetting

SCORES = [("grocery", "top1", "Fine top-1"), ("grocery", "coarse_top1", "Coarse top-1")]
SHOWN = {key: METHODS[key] for key in ("base", "full", "adapter", "adapter_hard")}
SETS = [
    GeneralSet("tuxpaint", RetrievalPairs([], [], [])),
    GeneralSet("emoji", LabelledPictures([], [], [])),
]


def entry(row: str, value: float, seed: int | None, metric: str = "top1") -> dict[str, Any]:
    return {"row": row, "dataset": "grocery", "metric": metric, "value": value, "seed": seed}


def rows() -> list[dict[str, Any]]:
    """The base; fine-tuning that forgets 12 points; an adapter and the domain link that forget 3."""
    found = [entry("base", 30.0, None), *general_rows("base", lost(0), SETS, seed=None)]
    for name, value in {"full": 69.0, "adapter": 70.9, "adapter_hard": 71.5}.items():
        full = name == "full"
        found.append(entry(name, value, 7))
        found += general_rows(name, lost(12 if full else 3), SETS, seed=7)
        found += training_rows(
            name,
            parameters=20_000_000 if full else 500_000,
            base_parameters=20_000_000,
            minutes=30.0 if full else 9.0,
            seed=7,
        )
    return found


def side_by_side(rows: list[dict[str, Any]], note: str = "") -> Table:
    return method_table(rows, SCORES, group="Photos", methods=SHOWN, title="Methods", note=note)


def lost(points: float) -> dict[str, Any]:
    before = {"tuxpaint": 46.0, "emoji": 28.0}
    return forgetting(before, {"tuxpaint": 46.0 - points - 1, "emoji": 28.0 - points + 1} if points else before)


def cells(table: Table, name: str) -> dict[str, Cell]:
    row = find(table, name)
    return {column.label: as_cell(cell) for column, cell in zip(table.columns, row.cells)}


def find(table: Table, name: str) -> TableRow:
    return next(row for row in table.rows if as_cell(row.cells[0]).value == name)


def test_results_become_rows_with_seeds() -> None:
    found = with_seed([{"row": "full", "dataset": "grocery", "metric": "top1", "value": 1.0}], 3)
    found += general_rows("full", lost(12), SETS, seed=3)
    found += training_rows("full", parameters=500, base_parameters=20_000, minutes=2.0, seed=3)
    found = json.loads(json.dumps(found))
    assert [(row["dataset"], row["metric"], row["value"]) for row in found] == [
        ("grocery", "top1", 1.0),
        ("tuxpaint", "mR", 33.0),
        ("emoji", "top1", 17.0),
        ("general", "score", 25.0),
        ("general", "forgetting", 12.0),
        ("general", "forgetting_relative", pytest.approx(100 * 12 / 37)),
        ("training", "parameters", 500),
        ("training", "percent_of_base", 2.5),
        ("training", "minutes", 2.0),
    ]
    assert {row["seed"] for row in found} == {3}


def test_relative_forgetting_is_absent_when_there_was_nothing() -> None:
    none = forgetting({"tuxpaint": 0.0, "emoji": 0.0}, {"tuxpaint": 1.0, "emoji": 0.0})
    assert [row["metric"] for row in general_rows("full", none, SETS, seed=1)][-1] == "forgetting"


def test_spread() -> None:
    assert spread([68.0, 69.0, 70.0]) == Spread(69.0, 1.0, 3)
    assert spread([1.0]) == Spread(1.0, None, 1)
    assert spread([]) is None


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=6))
def test_a_spread_is_never_negative_and_its_mean_inside(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert found.deviation is not None
    assert found.deviation >= 0
    assert min(values) - 1e-9 <= found.mean <= max(values) + 1e-9


def test_methods_side_by_side() -> None:
    table = side_by_side(rows(), note="Opened once.")
    assert [as_cell(row.cells[0]).value for row in table.rows] == [name for name, _ in SHOWN.values()]
    assert [column.group for column in table.columns] == [
        "", "Photos", "Photos", "General", "General", "Training", "Training",
    ]  # fmt: skip
    full, base = cells(table, "Continual fine-tuning"), cells(table, "Base, zero-shot")
    link, adapter = cells(table, "Adapter, hard sampling"), cells(table, "Adapter")
    assert (full["Fine top-1"].value, full["Fine top-1"].note) == (69.0, "")
    assert (base["Fine top-1"].value, base["Fine top-1"].note) == (30.0, "")
    assert base["Minutes"].value is None
    assert (link["Fine top-1"].note, link["Fine top-1"].tone) == ("best", "plain")
    assert (adapter["Fine top-1"].note, adapter["Fine top-1"].tone) == ("", "plain")
    assert link["Coarse top-1"].value is None
    assert (full["Parameters"].value, full["Parameters"].note) == (20_000_000, "100% of the base")
    assert link["Parameters"].note == "best · 2.5% of the base"
    assert link["Parameters"].tone == "good"  # no seed changes it
    assert (link["Forgotten, points"].value, link["Forgotten, points"].note) == (3.0, "best")
    assert find(table, "Adapter, hard sampling").strong
    assert table.note.startswith("Opened once.\n\nOne seed: nothing is known about the spread")


def test_the_base_is_never_the_best_of_the_trained() -> None:
    table = side_by_side([*rows(), entry("base", 99.0, None, "coarse_top1")])
    assert cells(table, "Base, zero-shot")["Coarse top-1"].note == ""
    assert cells(table, "Base, zero-shot")["Score"].note == ""


def test_each_general_set_and_its_change() -> None:
    table = general_table(rows(), [("tuxpaint", "mR", "Tux Paint"), ("emoji", "top1", "Emoji")], methods=SHOWN)
    assert [(column.group, column.label) for column in table.columns[1:]] == [("Tux Paint", "mR"), ("Emoji", "top-1")]
    assert [as_cell(cell) for cell in find(table, "Base, zero-shot").cells[1:]] == [Cell(46.0), Cell(28.0)]
    assert [as_cell(cell) for cell in find(table, "Adapter, hard sampling").cells[1:]] == [
        Cell(42.0, "−4.0"), Cell(26.0, "−2.0"),
    ]  # fmt: skip


def test_the_curve_is_a_line_per_method_from_the_base() -> None:
    points = [
        {"row": "adapter_hard", "alpha": alpha, "domain": 30 + 40 * alpha + seed, "general": 45 - alpha, "seed": seed}
        for seed in (1, 3)
        for alpha in (1.0, 0.0, 0.5)
    ]
    points += [{"row": "full", "alpha": 0.0, "domain": 32.0, "general": 45.0}, {"row": "unknown", **points[0]}]
    lines = alpha_lines(points[:-1], domain="top-1, %", note="On validation data.")
    full, link = lines.panels[0].series
    assert (full.name, link.name) == ("Continual fine-tuning", "Adapter, hard sampling")
    assert list(link.labels) == ["base", "0.5", "1"]
    assert list(link.xs) == [45.0, 44.5, 44.0]
    assert list(link.ys) == [32.0, 52.0, 72.0]  # means over seeds
    assert (link.color, lines.panels[0].color(1)) == (1, 1)
    assert lines.note.endswith("On validation data.")


def test_training_curves_have_a_line_for_who_has_the_figure() -> None:
    history = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 100)]
    history += [{"kind": "validation", "step": 99, "top1": 50.0}]
    lines = training_curves(
        {"full": history, "adapter_hard": history[:2]},
        terms={"loss": "Loss"},
        metrics={"top1": "Validation top-1"},
        kept=(99, "kept"),
    )
    loss, top1 = lines.panels
    assert [series.name for series in loss.series] == ["Continual fine-tuning", "Adapter, hard sampling"]
    assert [series.name for series in top1.series] == ["Continual fine-tuning"]
    assert (loss.smooth, top1.smooth, loss.mark, top1.mark) == (15, 1, None, (99, "kept"))
    assert "compare validation, not loss" in lines.note
    assert training_curves({"full": history}, terms={"loss": "Loss"}, metrics={}).note == ""


def test_all_of_it_renders() -> None:
    sections = [
        side_by_side(rows()),
        general_table(rows(), [("tuxpaint", "mR", "Tux Paint")], methods=SHOWN, title="Elsewhere"),
        alpha_lines([{"row": "full", "alpha": 0.5, "domain": 32.0, "general": 45.0}], domain="top-1", title="Curve"),
        training_curves({}, terms={"loss": "Loss"}, metrics={}),
    ]
    report = Report("t", sections=sections)
    for rendered in (render_html(report), render_markdown(report)):
        assert "Adapter, hard sampling" in rendered
        assert "100% of the base" in rendered
    assert "| Continual fine-tuning | 0.5 | 45 | 32 |" in render_markdown(report)
    assert "general score, % 45, top-1 32" in render_html(report)
