"""The quickstart's Chinese, trained from several seeds: how much of its table is the seed's.

    python benchmarks/language_seeds.py --seeds 0,1,2

Every seed trains `recipes/language-zh.yaml` as `make quickstart` does, with pairs drawn, validation pairs set aside and
weights started anew, and opens the test sets once. Seeds that stand in the output file with the same recipe are
not repeated; a file with seeds of another recipe is refused, not written over. Encoded texts are shared by all seeds,
so seconds are of training alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from domain_tables import shown
from language_study import finished_runs
from options import numbers

from trimtab.adapters.adapted import load_adapted
from trimtab.config import LanguageRecipe, to_mapping
from trimtab.errors import TrimtabError
from trimtab.evaluation.domain_summaries import spread
from trimtab.evaluation.summaries import ratio_to_english, score
from trimtab.files import write_json, write_text
from trimtab.recipes.adapt import adapt
from trimtab.recipes.quickstart import quickstart_recipe
from trimtab.recipes.quickstart_language import DATASETS, evaluate, test_sets
from trimtab.towers.hf import load_base

ROWS = {
    "english_base": "English, base",
    "target_raw": "Chinese, base",
    "adapted_target": "**Chinese, adapted**",
    "adapted_target_csls": "the same, hubness corrected by `csls`",
    "adapted_english": "English, adapted",
    "adapted_english_unrouted": "English, through the adapter",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", type=numbers)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-language-seeds"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language_seeds.json"))
    arguments = parser.parse_args()
    recipe = quickstart_recipe(arguments.work)
    common = without_seed(recipe)
    try:
        sets = test_sets(arguments.work / "pictures")
        runs = finished_runs(arguments.out, common)
        base = load_base(recipe.base).fingerprint
        if any(run["fingerprints"]["base"] != base for run in runs):
            sys.exit(f"error: {arguments.out} has runs of another base: name another file by --out")
        for seed in arguments.seeds:
            if any(run["seed"] == seed for run in runs):
                print(f"seed {seed}: there already", flush=True)
                continue
            runs.append(run_seed(replace(recipe, seed=seed, out=str(arguments.work / f"seed-{seed}")), sets))
            write_json(arguments.out, {"recipe": common, "runs": runs})
            write_text(arguments.out.with_suffix(".md"), as_table(runs))
    except TrimtabError as error:
        sys.exit(f"error: {error}")
    write_text(arguments.out.with_suffix(".md"), as_table(runs))


def run_seed(recipe: LanguageRecipe, sets: Sequence[Any]) -> dict[str, Any]:
    """Train one seed and open the test sets."""
    outcome = adapt(recipe)
    assert outcome is not None  # one process
    model = load_adapted(recipe.out)
    found, _ = evaluate(model, sets)
    return {
        "seed": recipe.seed,
        "pairs": outcome["pairs"],
        "validation": {name: outcome["validation"][name] for name in ("match", "english_match")},
        "rows": found["language"]["rows"],
        "training_seconds": outcome["seconds"]["training"],
        "fingerprints": {"base": model.base.fingerprint, "student": model.student.fingerprint},
    }


def without_seed(recipe: LanguageRecipe) -> dict[str, Any]:
    """What has to be the same for runs to stand in one table; places on one machine are left out."""
    data = replace(recipe.data, exclude=tuple(Path(path).name for path in recipe.data.exclude))
    mapping = to_mapping(replace(recipe, data=data))
    return {name: value for name, value in mapping.items() if name not in ("seed", "out")}


def as_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over seeds, of mR and of its share of English; then each seed's own."""
    columns = " | ".join(f"{title}: mR | of English" for title in DATASETS.values())
    lines = [f"| Text | {columns} |", "|---|" + "---:|---:|" * len(DATASETS)]
    for row, title in ROWS.items():
        cells = []
        for name in DATASETS:
            cells.append(_over_seeds([score(run["rows"], row, name, "mR") for run in runs]))
            cells.append(_over_seeds([ratio_to_english(run["rows"], row, name, "mR") for run in runs]) + "%")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    names = " | ".join(f"{title}: Chinese of English" for title in DATASETS.values())
    lines += ["", f"| seed | translation match, validation | {names} | training s |", "|---|---:|" + "---:|" * 3]
    for run in runs:
        kept = [f"{ratio_to_english(run['rows'], 'adapted_target', name, 'mR') or 0:.1f}%" for name in DATASETS]
        match = run["validation"]["match"]
        lines.append(f"| {run['seed']} | {match:.1f} | {' | '.join(kept)} | {run['training_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def _over_seeds(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    # What no seed changes, such as the base, has no deviation.
    return shown(spread(numbers if len(set(numbers)) > 1 else numbers[:1]), 1)


if __name__ == "__main__":
    main()
