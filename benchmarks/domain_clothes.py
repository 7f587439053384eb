"""The grocery recipe, as it is, in another domain: kinds of clothes, beside fine-tuning and drawing all pairs alike.

    python benchmarks/domain_clothes.py

The recipe was chosen on groceries, so this tells how far it carries. Pictures are of Fashion-MNIST, which a package
carries: 1,500 to train on, 500 for validation, 5,000 for the test. All rows see as many pairs in as many epochs, those
that `least_steps` gives. Runs that stand in the output file already, with the same recipe, are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from domain import RECIPE, ROWS, append, machine, read_runs, run_folder, without_places
from domain_tables import NAMES, Run, differences, over_seeds, shown, spread
from options import numbers

from trimtab.adapters.adapted import load
from trimtab.config import DomainRecipe, load_recipe, to_mapping
from trimtab.data.fashion import CAPTION, FashionFiles, write_fashion
from trimtab.data.manifests import read_class_names, read_classification
from trimtab.errors import TrimtabError
from trimtab.evaluation.classification import classify
from trimtab.files import digest_of, write_text
from trimtab.precision import fast_inference
from trimtab.recipes.adapt import adapt
from trimtab.recipes.folders import recipe_digest

SHOWN = ("base", "full", "adapter", "adapter_hard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3", type=numbers)
    parser.add_argument("--rows", nargs="+", default=list(SHOWN), choices=SHOWN)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-clothes"), help="pictures and runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/domain_clothes.jsonl"))
    arguments = parser.parse_args()
    try:
        files = write_fashion(arguments.work / "fashion", train=1500, validation=500, test=5000)
        for row in arguments.rows:
            # No seed changes the base.
            for seed in [0] if row == "base" else arguments.seeds:
                recipe = recipe_of(row, seed, files)
                setting = digest_of(recipe_digest(recipe), files.train.read_text(encoding="utf-8"))[:16]
                if setting not in {one["setting"] for one in read_runs(arguments.out)}:
                    print(f"{row}, seed {seed}", flush=True)
                    found = run(row, recipe, files, arguments.work)
                    published = to_mapping(without_places(recipe))
                    facts = {"row": row, "seed": seed, "setting": setting, "machine": machine(), "recipe": published}
                    append(arguments.out, {**found, **facts})
    except TrimtabError as error:
        sys.exit(f"error: {error}")
    write_text(arguments.out.with_suffix(".md"), as_table(read_runs(arguments.out)))


def recipe_of(row: str, seed: int, files: FashionFiles) -> DomainRecipe:
    places = [f"data.{split}={json.dumps([str(getattr(files, split))])}" for split in ("train", "validation")]
    recipe = load_recipe(RECIPE, [*places, "training.trackers=[]", f"seed={seed}", *ROWS[row]])
    assert isinstance(recipe, DomainRecipe)
    return recipe


def run(row: str, recipe: DomainRecipe, files: FashionFiles, work: Path) -> dict[str, Any]:
    """Train a row and name the test pictures."""
    if row == "base":
        return {"top1": top1(recipe.base, files), "minutes": None, "trained": None, "steps": None}
    with run_folder(work) as out:
        outcome = adapt(replace(recipe, out=str(out)))
        assert outcome is not None  # one process
        seconds = outcome["seconds"]
        return {
            "top1": top1(str(out), files),
            "minutes": (seconds["training"] + (0 if recipe.method == "full" else seconds["encoding"])) / 60,
            "trained": 100 * outcome["trained_parameters"] / outcome["base_parameters"],
            "steps": outcome["steps"],
            "validation": outcome["validation"],
            "gate": outcome.get("gate"),
        }


def top1(model: str, files: FashionFiles) -> float:
    """Percent of the test pictures that get their own class, from its name in the caption's template."""
    names = read_class_names(files.classes)
    items = read_classification(files.test, names, files.test.parent)
    loaded = load(model)
    with fast_inference(loaded.device):
        return classify(loaded, items, names, [CAPTION]).top1


def as_table(runs: Sequence[Run]) -> str:
    """A line per row, mean ± standard deviation over seeds; then what hard sampling gains, seed by seed."""
    steps = {one["row"]: one["steps"] for one in runs}
    found = {row: {one["seed"]: one for one in runs if one["row"] == row} for row in SHOWN if row in steps}
    lines = ["| Method | top-1 | trained, % of base | minutes | steps | seeds |", "|---|---:|---:|---:|---:|---:|"]
    for row, seeds in found.items():
        cells = [
            shown(over_seeds(seeds, lambda run: run["top1"]), 1),
            shown(over_seeds(seeds, lambda run: run["trained"]), 2),
            shown(over_seeds(seeds, lambda run: None if run.get("disturbed") else run["minutes"]), 1),
            str(steps[row] or "–"),
            "–" if row == "base" else str(len(seeds)),
        ]
        lines.append(f"| {NAMES[row]} | {' | '.join(cells)} |")
    hard = found.get("adapter_hard", {})
    lines += ["", "| Difference, paired by seed | top-1, points | seeds won |", "|---|---:|---:|"]
    for row in ("full", "adapter"):
        gains = differences(hard, found.get(row, {}), lambda run: run["top1"])
        won = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
        lines.append(f"| Adapter, hard sampling − {NAMES[row]} | {shown(spread(gains), 1, sign=True)} | {won} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
