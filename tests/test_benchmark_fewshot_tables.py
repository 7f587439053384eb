"""Tables of the few-shot benchmark: what the lines of runs say, and how sure that is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from trimtab.recipes.fewshot import read_runs

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
sys.path.insert(0, str(RESULTS.parent))
import fewshot_tables  # noqa: E402


def run(dataset: str, method: str, top1: float, seed: int = 1) -> dict[str, Any]:
    return {"dataset": dataset, "method": method, "shots": 1, "seed": seed, "top1": top1}


def test_leads_have_an_interval_over_sets_not_over_seeds() -> None:
    sets = ("a", "b", "c")
    runs = [run(one, "coop", 50.0, seed) for one in sets for seed in (1, 2)]
    for one, lead in zip(sets, (3.0, 6.0, -3.0), strict=True):
        runs += [run(one, "structured", 50.0 + lead + off, seed) for seed, off in ((1, 1.0), (2, -1.0))]
    # Deviation of 3, 6 and -3 is 4.58, of their mean 2.65; Student's t of two degrees of freedom 4.30.
    assert fewshot_tables.wins(runs)[-1] == "| CoOp | +2.0 ± 11.4 (2 of 3) |"
    assert fewshot_tables.wins([one for one in runs if one["dataset"] == "a"])[-1] == "| CoOp | +3.0 (1 of 1) |"


def test_the_goal_of_new_classes_says_on_how_many_sets_it_rests() -> None:
    new = [
        {"dataset": dataset, "method": method, "seed": 1, "harmonic": value}
        for dataset, method, value in (
            ("a", "structured", 60.0), ("a", "coop", 40.0), ("b", "structured", 30.0), ("b", "coop", 34.0)
        )
    ]  # fmt: skip
    runs = [run("a", "structured", 1.0)]
    lines = [line for line in fewshot_tables.goals(runs, new, ()) if "base-to-new" in line]
    assert len(lines) == 1
    assert lines[0].startswith("- reached so far: base-to-new harmonic mean above CoOp's (45.0 and 37.0; ")
    assert lines[0].endswith("sets won: +8.0 ± 152.5 (1 of 2))")


def test_committed_tables_are_those_of_the_committed_runs() -> None:
    found = [read_runs(RESULTS / f"fewshot{suffix}.jsonl") for suffix in ("", "_new", "_shares")]
    assert fewshot_tables.report(*found) == (RESULTS / "fewshot.md").read_text(encoding="utf-8")
