from __future__ import annotations

import json
import math
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
    by_seed,
    domain_columns,
    general_rows,
    general_table,
    method_comparison,
    method_table,
    spread,
    training_curves,
    training_rows,
    with_seed,
)
from trimtab.evaluation.forgetting import GeneralSet, LabelledPictures, forgetting

COLUMNS = domain_columns(
    [("grocery", "top1", "Fine top-1"), ("grocery", "coarse_top1", "Coarse top-1")], group="Photos"
)
SETS = [
    GeneralSet("tuxpaint", RetrievalPairs([], [], [])),
    GeneralSet("emoji", LabelledPictures([], [], [])),
]


def entry(row: str, value: float, seed: int | None, metric: str = "top1") -> dict[str, Any]:
    return {"row": row, "dataset": "grocery", "metric": metric, "value": value, "seed": seed}


def rows(seeds: tuple[int, ...] = (1, 2, 3)) -> list[dict[str, Any]]:
    """The base; fine-tuning that forgets 12 points on average; an adapter and the domain link that forget 3."""
    found = [entry("base", 30.0, None), *general_rows("base", lost(0), SETS, seed=None)]
    fine = {"full": (68.0, 69.0, 70.0), "adapter": (70.5, 70.9, 71.3), "adapter_hard": (71.0, 71.5, 72.0)}
    for name, values in fine.items():
        full = name == "full"
        for seed, value in zip(seeds, values):
            found.append(entry(name, value, seed))
            found += general_rows(name, lost(12 if full else 3), SETS, seed=seed)
            found += training_rows(
                name,
                parameters=20_000_000 if full else 500_000,
                base_parameters=20_000_000,
                minutes=30.0 if full else 9.0,
                seed=seed,
            )
    return found


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


def test_spread_and_seeds() -> None:
    assert by_seed(rows(), "full", "grocery", "top1") == {1: 68.0, 2: 69.0, 3: 70.0}
    assert by_seed([entry("full", math.nan, 1)], "full", "grocery", "top1") == {}
    assert spread([68.0, 69.0, 70.0]) == Spread(69.0, 1.0, 3)
    assert spread([1.0]) == Spread(1.0, None, 1)
    assert spread([]) is None
    with pytest.raises(ValueError, match="full, grocery, top1 has two values for seed 1"):
        by_seed([entry("full", 1.0, 1), entry("full", 2.0, 1)], "full", "grocery", "top1")


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=6))
def test_a_spread_is_never_negative_and_its_mean_inside(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert found.deviation is not None
    assert found.deviation >= 0
    assert min(values) - 1e-9 <= found.mean <= max(values) + 1e-9


def test_methods_side_by_side() -> None:
    table = method_table(rows(), COLUMNS, missing={"lora": "`peft` is not installed"}, note="Opened once.")
    assert [as_cell(row.cells[0]).value for row in table.rows] == [name for name, _ in METHODS.values()]
    assert [column.group for column in table.columns] == [
        "", "Photos", "Photos", "General", "General", "Training", "Training",
    ]  # fmt: skip
    full, base = cells(table, "Continual fine-tuning"), cells(table, "Base, zero-shot")
    link, adapter = cells(table, "Adapter, hard sampling"), cells(table, "Adapter")
    assert (full["Fine top-1"].value, full["Fine top-1"].note) == (69.0, "± 1.0")
    assert (base["Fine top-1"].value, base["Fine top-1"].note) == (30.0, "")
    assert base["Minutes"].value is None
    assert (link["Fine top-1"].note, link["Fine top-1"].tone) == ("± 0.5 · best", "good")
    # 0.6 points behind with a spread of the difference of 0.64: not told apart.
    assert (adapter["Fine top-1"].note, adapter["Fine top-1"].tone) == ("± 0.4 · ≈ best", "plain")
    assert link["Coarse top-1"].value is None
    assert (full["Parameters"].value, full["Parameters"].note) == (20_000_000, "100% of the base")
    assert link["Parameters"].note == "best · 2.5% of the base"
    assert (link["Forgotten, points"].value, link["Forgotten, points"].note) == (3.0, "± 0.0 · best")
    assert find(table, "LoRA").empty == "not available here: `peft` is not installed"
    assert find(table, "Linear probe").empty == "not available here: not measured in this run"
    assert find(table, "Adapter, hard sampling").strong
    assert table.note.startswith("Opened once.\n\nMean ± standard deviation over 3 seeds.")


def test_the_base_is_never_the_best_of_the_trained() -> None:
    table = method_table([*rows(), entry("base", 99.0, None, "coarse_top1")], COLUMNS)
    assert cells(table, "Base, zero-shot")["Coarse top-1"].note == ""
    assert cells(table, "Base, zero-shot")["Score"].note == ""


def test_one_seed_is_called_one_seed() -> None:
    table = method_table(rows((7,)), COLUMNS)
    link = cells(table, "Adapter, hard sampling")
    assert (link["Fine top-1"].note, link["Fine top-1"].tone) == ("best", "plain")
    assert link["Parameters"].tone == "good"  # no seed changes it
    assert table.note.startswith("One seed: nothing is known about the spread")


def test_a_method_with_fewer_seeds_says_so() -> None:
    fewer = [entry("lora", 66.0, 1), entry("linear_probe", 60.0, 1), entry("linear_probe", 62.0, 2)]
    table = method_table([*rows(), *fewer], COLUMNS)
    assert cells(table, "LoRA")["Fine top-1"].note == "one seed"
    assert cells(table, "Linear probe")["Fine top-1"].note == "± 1.4 · 2 seeds"


def test_nothing_is_best_alone_and_a_diverged_run_is_not_best() -> None:
    alone = [entry("full", 60.0, 1), entry("full", 61.0, 2)]
    assert cells(method_table(alone, COLUMNS), "Continual fine-tuning")["Fine top-1"].note == "± 0.7"
    diverged = [entry("full", 60.0, 1), entry("adapter", 50.0, 1), entry("adapter_hard", math.nan, 1)]
    table = method_table(diverged, COLUMNS)
    assert cells(table, "Continual fine-tuning")["Fine top-1"].note == "best"
    assert find(table, "Adapter, hard sampling").empty


def test_other_methods_can_be_added() -> None:
    methods = {**METHODS, "adapter_hard_25": ("Adapter, a quarter of the pairs", "the domain link")}
    table = method_table([*rows(), entry("adapter_hard_25", 70.0, 1)], COLUMNS, methods=methods)
    assert cells(table, "Adapter, a quarter of the pairs")["Fine top-1"].value == 70.0


def test_the_link_against_each_method_seed_by_seed() -> None:
    table = method_comparison(rows(), "grocery", "top1", "Fine top-1")
    assert [row.cells[0] for row in table.rows] == ["Base, zero-shot", "Continual fine-tuning", "Adapter"]
    full, adapter = cells(table, "Continual fine-tuning"), cells(table, "Adapter")
    # 3.0, 2.5 and 2.0: the spread of the differences, not of the methods.
    assert full["Fine top-1, points ahead"] == Cell("+2.5", "± 0.5 · ahead in 3 of 3 seeds")
    assert adapter["Fine top-1, points ahead"] == Cell("+0.6", "± 0.1 · ahead in 3 of 3 seeds")
    assert [full[name].value for name in ("forgetting", "minutes", "parameters")] == [25, 30, 2]
    base = cells(table, "Base, zero-shot")
    assert base["Fine top-1, points ahead"].value == "+41.5"
    assert base["forgetting"].value is None


def test_a_comparison_says_what_it_cannot_know() -> None:
    other = [entry("adapter_hard", 70.0, 1), entry("full", 71.0, 2), entry("lora", 71.0, 1)]
    table = method_comparison(other, "grocery", "top1", "Fine top-1")
    assert cells(table, "Continual fine-tuning")["Fine top-1, points ahead"] == Cell(None, "no seed in common")
    assert cells(table, "LoRA")["Fine top-1, points ahead"] == Cell("−1.0", "one seed")


def test_a_share_of_no_forgetting_is_not_a_number() -> None:
    gained = [entry("adapter_hard", 70.0, 1), entry("full", 60.0, 1)]
    gained += general_rows("adapter_hard", lost(3), SETS, seed=1) + general_rows("full", lost(0), SETS, seed=1)
    table = method_comparison(gained, "grocery", "top1", "Fine top-1")
    assert cells(table, "Continual fine-tuning")["forgetting"].value is None


def test_each_general_set_and_its_change() -> None:
    table = general_table(rows(), [("tuxpaint", "mR", "Tux Paint"), ("emoji", "top1", "Emoji")])
    assert [(column.group, column.label) for column in table.columns[1:]] == [("Tux Paint", "mR"), ("Emoji", "top-1")]
    assert [as_cell(cell) for cell in find(table, "Base, zero-shot").cells[1:]] == [Cell(46.0), Cell(28.0)]
    assert [as_cell(cell) for cell in find(table, "Adapter, hard sampling").cells[1:]] == [
        Cell(42.0, "−4.0 ± 0.0"), Cell(26.0, "−2.0 ± 0.0"),
    ]  # fmt: skip
    assert len(table.rows) == 4  # methods without figures are left out


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
        method_table(rows(), COLUMNS, title="Methods"),
        method_comparison(rows(), "grocery", "top1", "Fine top-1", title="Against each"),
        general_table(rows(), [("tuxpaint", "mR", "Tux Paint")], title="Elsewhere"),
        alpha_lines([{"row": "full", "alpha": 0.5, "domain": 32.0, "general": 45.0}], domain="top-1", title="Curve"),
        training_curves({}, terms={"loss": "Loss"}, metrics={}),
    ]
    report = Report("t", sections=sections)
    for rendered in (render_html(report), render_markdown(report)):
        assert "Adapter, hard sampling" in rendered
        assert "≈ best" in rendered
        assert "100% of the base" in rendered
    assert "| Continual fine-tuning | 0.5 | 45 | 32 |" in render_markdown(report)
    assert "general score, % 45, top-1 32" in render_html(report)
