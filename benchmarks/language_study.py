"""What each choice of the language link is worth: one change at a time, all else as the recipe has it.

    python benchmarks/language_study.py --out benchmarks/results/language_study.json

Every row trains `recipes/language-zh.yaml` on all of its pairs with one change, for one epoch, shorter than the
recipe's two, and is judged by translation match on the same validation pairs; no test picture is opened. With
`--seeds 3` each row is trained three times and its table has mean and standard deviation: a difference below that says
nothing.

Two things need no training of their own and are measured on the recipe's: hubness corrected at query time, and how
class names are best asked for, on those validation pairs that name a visible thing.

Texts are encoded once for all rows; only rows that change the student encode all of them anew, and every further seed
the phrases that it composes. Runs that stand in the output file already, with the same recipe and budget, are
not repeated; a file with runs of others is refused, not written over.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.adapters.adapted import load_adapted
from trimtab.config import LanguageRecipe, load_recipe, recipe_from_mapping, to_mapping
from trimtab.data.corpora import WeightedPair, cedict_pairs, weight_of
from trimtab.data.parallel import letters
from trimtab.data.templates import DEFAULT_TEMPLATES
from trimtab.errors import RecipeError
from trimtab.evaluation.classification import embed_classes
from trimtab.evaluation.matching import translation_match
from trimtab.files import write_json, write_text
from trimtab.recipes.adapt import adapt
from trimtab.recipes.sources import PREPARED, prepare

RECIPE = Path(__file__).parents[1] / "recipes" / "language-zh.yaml"
AS_IT_IS = "recipe as it is"
LONGEST = 24  # letters of a class name
FIGURES = ("match", "english_match", "cosine", "collapse")

# Both sides of a choice stand here where the recipe may take either; the side that it takes is not trained again.
VARIANTS: dict[str, list[str]] = {
    AS_IT_IS: [],
    # The start does not depend on the training that has to follow it.
    "closed-form map only": ["training.learning_rate=1e-12", "training.epochs=1", "data.epoch_pairs=1"],
    "optimiser: Muon": ["training.optimizer=muon"],
    "optimiser: twice the rate": ["training.learning_rate=2e-3"],
    "objective: MSE only": ["objective.infonce=0", "objective.mse=1"],
    "objective: cosine only": ["objective.infonce=0", "objective.mse=0", "objective.cosine=1"],
    "objective: InfoNCE only": ["objective.mse=0"],
    "objective: with Gram term": ["objective.gram=10"],
    "start: random": ["adapter.init=random"],
    "adapter: one layer": ["adapter.layers=1"],
    "adapter: two layers": ["adapter.layers=2"],
    "adapter: no hidden layer for words": ["adapter.hidden=0"],
    "adapter: 512 hidden for words": ["adapter.hidden=512"],
    "adapter: no translation memory": ["adapter.memory=0"],
    "adapter: width 128": ["adapter.width=128"],
    "adapter: width 384": ["adapter.width=384"],
    "pooling: attention": ["adapter.pooling=attention"],
    "English-English pairs: none": ["data.english_share=0"],
    "English-English pairs: 5%": ["data.english_share=0.05"],
    "English-English pairs: 10%": ["data.english_share=0.1"],
    "pairs: with composed phrases": ["data.phrases=25000"],
    "pairs: no nouns in templates": ["data.templates=0"],
    "student: layer -1": ["student.layers=[-1]"],
    "student: layer 8, stopped there": ["student.layers=[8]"],
    "student: layers 6 and 10, stopped there": ["student.layers=[6, 10]"],
    "student: layers 8 and -1": ["student.layers=[8, -1]"],
    "student: no prefix": ['student.prefix=""'],
    "student: prefix 'query: '": ['student.prefix="query: "'],
}


def first_glosses(_: str) -> Iterator[WeightedPair]:
    return cedict_pairs(max_glosses=1)


def no_heavier(_: str) -> Iterator[WeightedPair]:
    """What is visible neither comes first nor is drawn more often."""
    return ((target, english, weight / weight_of(english)) for target, english, weight in cedict_pairs())


# Rows that read the dictionary in another way.
READINGS: dict[str, Callable[[str], Iterator[WeightedPair]]] = {
    "pairs: first gloss of each entry": first_glosses,
    "pairs: visible things no heavier": no_heavier,
}
CSLS = "query time: hubness corrected by `csls`"
NAMES = "class names"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language_study.json"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=60_000, help="pairs per epoch")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of every row")
    parser.add_argument("--only", nargs="+", help="names of rows")
    arguments = parser.parse_args()
    budget = [f"training.epochs={arguments.epochs}", f"data.epoch_pairs={arguments.pairs}", "training.trackers=[]"]
    recipe = load_recipe(arguments.recipe, budget)
    assert isinstance(recipe, LanguageRecipe)
    variants = {**VARIANTS, **other_sources(recipe), **{name: [] for name in READINGS}}
    if unknown := set(arguments.only or ()) - variants.keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(variants)}")

    def changed(changes: list[str]) -> bool:
        return load_recipe(arguments.recipe, [*budget, *changes]) != recipe

    chosen = {
        name: changes
        for name, changes in variants.items()
        if name in (arguments.only or variants) and (name == AS_IT_IS or name in READINGS or changed(changes))
    }
    try:
        runs = finished_runs(arguments.out, to_mapping(recipe))
    except RecipeError as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as scratch:
        validation, count = shared_validation(recipe, Path(scratch))
        for seed in range(arguments.seeds):
            for name, changes in chosen.items():
                if any((run["change"], run["seed"]) == (name, seed) for run in runs):
                    continue
                out = f"{scratch}/{len(runs)}"
                places = [f"data.validation=[{validation}]", f"out={out}", f"seed={seed}"]
                with reading(name):
                    run = train(load_recipe(arguments.recipe, [*budget, *places, *changes]), count)
                found = [{"change": name, **run}]
                if name == AS_IT_IS:
                    found += without_training(out, recipe)
                runs += [{"seed": seed, **one} for one in found]
                for one in found:
                    print(json.dumps(one, ensure_ascii=False), flush=True)
                rows = summarise(runs, [*variants, CSLS])
                facts = {"recipe": to_mapping(recipe), "validation_pairs": count}
                write_json(arguments.out, {**facts, "rows": rows, "runs": runs})
                write_text(arguments.out.with_suffix(".md"), as_table(rows) + names_table(runs))


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """The dictionary read as a row asks for."""
    before = PREPARED["cedict"]
    PREPARED["cedict"] = READINGS.get(name, before)
    try:
        yield
    finally:
        PREPARED["cedict"] = before


def without_training(folder: str, recipe: LanguageRecipe) -> list[dict[str, Any]]:
    """What the trained model of a folder gives on the recipe's validation pairs when it is asked in other ways."""
    model: Any = load_adapted(folder)
    pairs = prepare(recipe).validation
    target, english = model.encode_text(pairs.targets), model.base.encode_text(pairs.english)
    match = translation_match(target, english, groups=pairs.english, hubness="csls").accuracy
    found: list[dict[str, Any]] = [{"change": CSLS, "match": match}]
    named = {
        chinese: name
        for chinese, name in zip(pairs.targets, pairs.english, strict=True)
        if weight_of(name) > 1 and max(letters(chinese), len(name)) <= LONGEST
    }
    named = {chinese: name for name, chinese in {name: chinese for chinese, name in named.items()}.items()}
    chinese_ways, english_ways = DEFAULT_TEMPLATES["zh"], DEFAULT_TEMPLATES["en"]
    for way, templates in {
        "by themselves": (["{}"], ["{}"]),
        "in one template": (chinese_ways[:1], english_ways[:1]),
        f"the mean of {len(chinese_ways)} templates": (chinese_ways, english_ways),
    }.items():
        own = embed_classes(model, list(named), templates[0])
        teacher = embed_classes(model.base, list(named.values()), templates[1])
        match = translation_match(own, teacher).accuracy
        found.append({"change": NAMES, "asked": way, "names": len(named), "match": match})
    return found


def other_sources(recipe: LanguageRecipe) -> dict[str, list[str]]:
    """Rows that leave sources of the recipe's pairs out, or take less or more of one."""

    def only(names: Sequence[str]) -> str:
        return "data.train=" + json.dumps([to_mapping(one) for one in recipe.data.train if one.path in names])

    def limited(**limits: int) -> str:
        sources = [to_mapping(one) for one in recipe.data.train]
        return "data.train=" + json.dumps([
            one | {"limit": limits.get(one["path"].partition(":")[0], one["limit"])} for one in sources
        ])  # fmt: skip

    names = [source.path for source in recipe.data.train]
    rows = {f"pairs: without {left_out}": [only([name for name in names if name != left_out])] for left_out in names}
    if "cedict" in names:
        rows["pairs: dictionary alone"] = [only(["cedict"]), "data.phrases=0", "data.templates=0"]
        rows["pairs: 36,000 entries of the dictionary"] = [limited(cedict=36_000)]
        rows["pairs: 46,000 entries of the dictionary"] = [limited(cedict=46_000)]
    if "cataclysm:zh_CN" in names:
        rows["pairs: 15,000 sentences of the game"] = [limited(cataclysm=15_000)]
        rows["pairs: all sentences of the game"] = [limited(cataclysm=10**6)]
    return rows if len(names) > 1 else {}


def shared_validation(recipe: LanguageRecipe, folder: Path) -> tuple[Path, int]:
    """The recipe's own validation pairs as a file, which every row keeps out of its training; and their number."""
    pairs = prepare(recipe).validation
    path = folder / "validation.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["target", "english", "language"])
        writer.writerows(zip(pairs.targets, pairs.english, pairs.languages, strict=True))
    return path, len(pairs)


def train(recipe: Any, validation_pairs: int) -> dict[str, Any]:
    """Figures of one run."""
    started = time.monotonic()
    outcome = adapt(recipe)
    assert outcome is not None
    used = outcome["counts"]["validation: all sources"]["kept"]
    assert used == validation_pairs, f"{used} of {validation_pairs} validation pairs were used: rows cannot be compared"
    return {
        **{name: outcome["validation"][name] for name in FIGURES},
        "pairs": outcome["pairs"],
        "encoding_seconds": outcome["seconds"]["encoding"],
        "training_seconds": outcome["seconds"]["training"],
        "seconds": time.monotonic() - started,
    }


def finished_runs(path: Path, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs of an earlier call with the same recipe and budget.

    Raises:
        RecipeError: the file has runs of others, which would be lost.
    """
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    # Keys that are younger than the runs had their defaults.
    known = to_mapping(recipe_from_mapping(earlier["recipe"], str(path)))
    if {name: known[name] for name in recipe} != recipe:
        raise RecipeError(f"{path} has runs of another recipe or budget: name another file by --out")
    return earlier["runs"]


def summarise(runs: list[dict[str, Any]], order: list[str]) -> list[dict[str, Any]]:
    """One row per change: means over seeds, and the standard deviation of the match where there are several."""
    rows = []
    for name in order:
        if mine := [run for run in runs if run["change"] == name]:
            means = {
                key: statistics.fmean(run[key] for run in mine) if key in mine[0] else None
                for key in (*FIGURES, "pairs", "training_seconds")
            }
            spread = statistics.stdev(run["match"] for run in mine) if len(mine) > 1 else None
            rows.append({"change": name, **means, "match_spread": spread, "seeds": len(mine)})
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| change | pairs | match, Chinese | against the recipe | match, English through the adapter | mean cosine "
        "| training s |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = next((row["match"] for row in rows if row["change"] == AS_IT_IS), None)
    for row in rows:
        spread = "" if row["match_spread"] is None else f" ± {row['match_spread']:.1f}"
        is_reference = reference is None or row["change"] == AS_IT_IS
        difference = "" if is_reference else f"{row['match'] - reference:+.1f}"
        if row["pairs"] is None:  # nothing was trained
            lines.append(f"| {row['change']} | – | {row['match']:.1f}{spread} | {difference} | – | – | – |")
            continue
        lines.append(
            f"| {row['change']} | {row['pairs']:,.0f} | {row['match']:.1f}{spread} | {difference} "
            f"| {row['english_match']:.1f} | {row['cosine']:.3f} | {row['training_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def names_table(runs: list[dict[str, Any]]) -> str:
    """The match of class names as they are asked for, mean over seeds."""
    mine = [run for run in runs if run["change"] == NAMES]
    if not mine:
        return ""
    lines = ["", f"| {mine[0]['names']} class names of the validation pairs | match |", "|---|---:|"]
    for asked in dict.fromkeys(run["asked"] for run in mine):
        found = statistics.fmean(run["match"] for run in mine if run["asked"] == asked)
        lines.append(f"| {asked} | {found:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
