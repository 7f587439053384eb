"""Means and spreads of few-shot runs, and the blocks made of them."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.evaluation.blocks import Cell, LinePanel, Series
from trimtab.evaluation.charts import lines_svg
from trimtab.evaluation.fewshot_summaries import (
    MEAN,
    METHODS,
    fewshot_curves,
    fewshot_table,
    mean_over_sets,
    names_of,
    spread_of,
)


def run(method: str, dataset: str, shots: int, seed: int, top1: float) -> dict[str, Any]:
    return {"method": method, "dataset": dataset, "shots": shots, "seed": seed, "top1": top1}


RUNS = [
    run("structured", "a", 1, 1, 50.0),
    run("structured", "a", 1, 2, 54.0),
    run("structured", "b", 1, 1, 20.0),
    run("structured", "b", 1, 2, 20.0),
    run("coop", "a", 1, 1, 40.0),
    run("structured", "a", 4, 1, 70.0),
]


def test_means_and_deviations_are_over_seeds() -> None:
    found = spread_of(RUNS, "a", "structured", 1)
    assert found is not None
    assert (found.mean, found.n) == (52.0, 2)
    assert found.deviation == pytest.approx(2.828, abs=1e-3)
    one = spread_of(RUNS, "a", "coop", 1)
    assert one is not None
    assert one.deviation is None
    assert spread_of(RUNS, "b", "coop", 1) is None


def test_a_mean_over_sets_is_of_seeds_that_all_have() -> None:
    found = mean_over_sets(RUNS, "structured", 1, ["a", "b"])
    assert found is not None
    assert (found.mean, found.n) == (36.0, 2)
    assert mean_over_sets(RUNS, "coop", 1, ["a", "b"]) is None


def test_the_last_of_equal_runs_counts() -> None:
    found = spread_of([*RUNS, run("coop", "a", 1, 1, 60.0)], "a", "coop", 1)
    assert found is not None
    assert found.mean == 60.0


def test_methods_stand_in_the_order_of_tables() -> None:
    assert names_of(RUNS, "method") == ["coop", "structured"]
    assert names_of([*RUNS, run("mine", "a", 16, 1, 1.0)], "method") == ["coop", "structured", "mine"]
    assert names_of(RUNS, "shots") == [1, 4]


def test_the_table_marks_the_best_of_each_column() -> None:
    table = fewshot_table(RUNS, "a")
    coop, structured = table.rows
    assert isinstance(structured.cells[1], Cell)
    assert structured.cells[1].note == "± 2.8, best"
    assert isinstance(coop.cells[1], Cell)
    assert coop.cells[1].note == "one seed"
    assert coop.cells[2] is None
    assert structured.strong


def test_curves_have_a_panel_per_set_and_whiskers() -> None:
    lines = fewshot_curves(RUNS)
    assert [panel.title for panel in lines.panels] == ["a", "b", MEAN]
    (mine,) = [one for one in lines.panels[0].series if one.name == "Structured prompt"]
    assert next(iter(mine.spread)) == pytest.approx(2.828, abs=1e-3)
    assert "spread 2.83 at most" in lines_svg(lines.panels[0])


def test_methods_without_a_colour_of_their_own_are_drawn_or_named() -> None:
    few = [run(method, "a", shots, 1, 50.0) for method in ("cocoop", "clip_lora", "structured") for shots in (1, 4)]
    lines = fewshot_curves(few)
    assert {one.name for one in lines.panels[0].series} == {"CoCoOp", "CLIP-LoRA", "Structured prompt"}
    assert len({one.color for one in lines.panels[0].series}) == 3
    assert lines.note == ""
    many = [run(method, "a", 1, 1, 50.0) for method in METHODS]
    lines = fewshot_curves(many, note="Means.")
    drawn = {one.name for one in lines.panels[0].series}
    assert all(name in drawn or name in lines.note for name, _ in METHODS.values())
    assert lines.note.startswith("Means.\n\nNot drawn")


def test_whiskers_are_within_the_axes_and_must_fit_their_points() -> None:
    plain, wide = (
        lines_svg(LinePanel([Series("one", [1, 2], [10.0, 11.0], spread=spread)])) for spread in ((), (5.0, 5.0))
    )
    assert wide.count("<path") == plain.count("<path") + 2
    with pytest.raises(ValueError, match="2 points and 1 spreads"):
        Series("one", [1, 2], [1, 2], spread=[1])
