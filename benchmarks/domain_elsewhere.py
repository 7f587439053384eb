"""The grocery recipe, as it is, in other domains, beside fine-tuning and drawing all pairs alike.

    python benchmarks/domain_elsewhere.py

The recipe was chosen on groceries, so this tells how far it carries. Both sets come with packages:

- clothes: Fashion-MNIST, ten classes; 1,500 pictures to train on, 500 for validation, 5,000 for the test;
- drawings: OpenMoji, each with a name of its own; about 1,200 to train on, 200 for validation, and for the test the 200
  names that neither `starter` nor the recipe has seen drawn by anyone.

All rows see as many pairs in as many epochs, those that `least_steps` gives. Runs that stand in the output file
already, with the same recipe, are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from domain import RECIPE, ROWS, append, machine, read_runs, run_folder, what_counts, without_places
from domain_tables import NAMES, Run, differences, of_last_setting, over_seeds, shown, spread
from options import numbers

from trimtab.adapters.adapted import load
from trimtab.config import DomainRecipe, load_recipe, to_mapping
from trimtab.data.corpora import cldr_annotations, held_out_emoji
from trimtab.data.fashion import CAPTION, write_fashion
from trimtab.data.manifests import read_class_names, read_classification, read_retrieval
from trimtab.data.pictures import openmoji_pictures
from trimtab.errors import TrimtabError
from trimtab.evaluation.classification import classify
from trimtab.evaluation.retrieval import retrieve
from trimtab.files import digest_of, write_text
from trimtab.precision import fast_inference
from trimtab.recipes.adapt import adapt
from trimtab.recipes.folders import recipe_digest

SHOWN = ("base", "full", "adapter", "adapter_hard")


@dataclass(frozen=True)
class Elsewhere:
    """A domain that the recipe was not chosen on.

    Attributes:
        metric: name of what `score` gives.
        train, validation: tables of pictures and captions.
        score: a model on the test pictures, in percent.
    """

    metric: str
    train: Path
    validation: Path
    score: Callable[[Any], float]


def clothes(folder: Path) -> Elsewhere:
    files = write_fashion(folder, train=1500, validation=500, test=5000)
    names = read_class_names(files.classes)

    def score(model: Any) -> float:
        items = read_classification(files.test, names, files.test.parent)
        return classify(model, items, names, [CAPTION]).top1

    return Elsewhere("top-1", files.train, files.validation, score)


def drawings(folder: Path) -> Elsewhere:
    english, secret = cldr_annotations("en"), held_out_emoji()
    held_out = {english[symbol][0] for symbol in secret if symbol in english}
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rendered = openmoji_pictures("zh", folder / "pictures", held_out_only=False)
    every = {f"pictures/{one.path.name}": one.english for one in rendered}
    seen = sorted(
        (path for path, name in every.items() if name not in held_out), key=lambda path: digest_of("split", every[path])
    )
    parts = {
        "validation": seen[:200],
        "train": seen[200:],
        "test": [path for path, name in every.items() if name in held_out],
    }
    for name, paths in parts.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("image", "text"), *((path, every[path]) for path in paths)])

    def score(model: Any) -> float:
        return retrieve(model, read_retrieval(folder / "test.csv")).mR

    return Elsewhere("mR", folder / "train.csv", folder / "validation.csv", score)


SETS: dict[str, Callable[[Path], Elsewhere]] = {"clothes": clothes, "drawings": drawings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", default="1,2,3", type=numbers)
    parser.add_argument("--rows", nargs="+", default=list(SHOWN), choices=SHOWN)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-elsewhere"), help="pictures and runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/domain_elsewhere.jsonl"))
    arguments = parser.parse_args()
    try:
        base = load("starter").fingerprint
        for name in arguments.sets:
            where = SETS[name](arguments.work / name)
            for row, seed, recipe in recipes(where, arguments.rows, arguments.seeds):
                setting = setting_of(recipe, where, base)
                done = {(one["row"], one["seed"], one["setting"]) for one in read_runs(arguments.out)}
                if (row, seed, setting) not in done:
                    print(f"{name}: {row}, seed {seed}", flush=True)
                    found = run(row, recipe, where, arguments.work)
                    facts = {"set": name, "metric": where.metric, "row": row, "seed": seed, "setting": setting}
                    published = {"machine": machine(), "recipe": to_mapping(without_places(recipe))}
                    append(arguments.out, {**facts, **found, **published})
    except TrimtabError as error:
        sys.exit(f"error: {error}")
    write_text(arguments.out.with_suffix(".md"), as_tables(read_runs(arguments.out)))


def recipes(where: Elsewhere, rows: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int, DomainRecipe]]:
    """Row, seed and recipe of each run that is wanted."""
    for row in rows:
        # No seed changes the base.
        for seed in [0] if row == "base" else seeds:
            sources = [f"data.{part}={json.dumps([str(getattr(where, part))])}" for part in ("train", "validation")]
            recipe = load_recipe(RECIPE, [*sources, "training.trackers=[]", f"seed={seed}", *ROWS[row]])
            assert isinstance(recipe, DomainRecipe)
            yield row, seed, recipe


def setting_of(recipe: DomainRecipe, where: Elsewhere, fingerprint: str) -> str:
    """Names data, base and what counts of the recipe, neither the seed, as runs of equal settings are averaged, nor
    where the tables lie."""
    published = without_places(replace(recipe, seed=0))
    asked = digest_of(recipe_digest(what_counts(published)), where.train.read_text(encoding="utf-8"))[:16]
    return digest_of(asked, fingerprint)[:16]


def run(row: str, recipe: DomainRecipe, where: Elsewhere, work: Path) -> dict[str, Any]:
    """Train a row, and measure it on the test pictures."""
    if row == "base":
        return {"score": score(recipe.base, where), "trained": None, "steps": None}
    with run_folder(work) as out:
        outcome = adapt(replace(recipe, out=str(out)))
        assert outcome is not None  # one process
        return {
            "score": score(str(out), where),
            "trained": 100 * outcome["trained_parameters"] / outcome["base_parameters"],
            "steps": outcome["steps"],
            "validation": outcome["validation"],
            "gate": outcome.get("gate"),
        }


def score(name: str, where: Elsewhere) -> float:
    model = load(name)
    with fast_inference(model.device):
        return where.score(model)


def as_tables(runs: Sequence[Run]) -> str:
    """For each set a line per row, mean ± standard deviation over seeds; then what the link gains, seed by seed."""
    return "\n".join(as_table(name, mine) for name in SETS if (mine := [one for one in runs if one["set"] == name]))


def as_table(name: str, runs: Sequence[Run]) -> str:
    counted = of_last_setting(runs, lambda run: run["row"])
    found = {row: {one["seed"]: one for one in counted if one["row"] == row} for row in SHOWN}
    lines = [
        f"| {name.capitalize()} | {runs[0]['metric']} | trained, % of base | steps | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    for row, seeds in found.items():
        if not seeds:
            continue
        cells = [
            shown(over_seeds(seeds, lambda run: run["score"]), 1),
            shown(over_seeds(seeds, lambda run: run["trained"]), 2),
            str(next(iter(seeds.values()))["steps"] or "–"),
            "–" if row == "base" else str(len(seeds)),
        ]
        lines.append(f"| {NAMES[row]} | {' | '.join(cells)} |")
    lines += ["", "| Difference, paired by seed | points | seeds won |", "|---|---:|---:|"]
    for row in ("full", "adapter"):
        gains = differences(found["adapter_hard"], found[row], lambda run: run["score"])
        won = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
        lines.append(f"| Adapter, hard sampling − {NAMES[row]} | {shown(spread(gains), 1, sign=True)} | {won} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
