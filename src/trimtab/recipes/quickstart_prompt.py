"""The third part of the main job: `starter` becomes a classifier of clothes from a few labelled pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.config import LabelSource, PromptRecipe, to_mapping, to_yaml
from trimtab.data.fashion import FashionFiles
from trimtab.evaluation.blocks import Block, Code, Details, Group, Text, Tile, Tiles
from trimtab.evaluation.fewshot_summaries import MAIN_METHOD, METHODS, fewshot_curves, fewshot_table, spread_of
from trimtab.recipes.adapt import adapt
from trimtab.recipes.fewshot import Plan, fewshot
from trimtab.recipes.fewshot_report import PROTOCOL

DATASET, NAME = "fashion", "Clothes from a few pictures"
SHOTS = (1, 4, 16)
SEEDS = (1,)
COMPARED = ("template", "linear_probe", "coop", MAIN_METHOD)


@dataclass(frozen=True)
class PromptPart:
    """What goes into ``results.json``, the runs that the report draws, and the recipe of the folder."""

    results: dict[str, Any]
    runs: list[dict[str, Any]]
    recipe: PromptRecipe


def learn_prompts(recipe: PromptRecipe, domain: str) -> PromptPart:
    """Compare a few methods at a few numbers of shots, then write the adapted folder with the most of them.

    The methods are compared on the bare base. The folder stands on the domain link, so that all three links of the
    quickstart can be put together.

    Args:
        recipe: with test pictures, which each run opens once.
        domain: adapted folder of the domain link.
    """
    started = time.monotonic()
    out = Path(recipe.out)
    plan = Plan(SHOTS, SEEDS, COMPARED, DATASET)
    runs = fewshot(recipe, plan, out.with_name(f"{out.name}.fewshot.jsonl"))
    final = replace(recipe, base=domain, seed=SEEDS[0], data=replace(recipe.data, shots=SHOTS[-1]))
    outcome = adapt(final)
    assert outcome is not None  # one process
    results = {
        "rows": rows_of(runs),
        "sizes": {"test": runs[0]["n_test"], "classes": runs[0]["n_classes"], "shots": list(SHOTS)},
        "adapted": {
            "base": domain,
            **{name: outcome[name] for name in ("folder", "trained_parameters", "validation", "test")},
        },
        "seconds": {"all": time.monotonic() - started},
        "recipe": to_mapping(final),
    }
    return PromptPart(results, runs, final)


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs as rows of ``results.json``."""
    return [
        {
            "row": run["method"],
            "dataset": run["dataset"],
            "metric": "top1",
            "value": run["top1"],
            "seed": run["seed"],
            "shots": run["shots"],
        }
        for run in runs
    ]


def prompt_recipe(recipe: PromptRecipe, out: Path, files: FashionFiles) -> PromptRecipe:
    """The committed recipe, reading `files` and writing into `out`."""
    train, validation, test = ((LabelSource(str(path)),) for path in (files.train, files.validation, files.test))
    data = replace(recipe.data, train=train, validation=validation, test=test, classes=str(files.classes))
    return replace(recipe, out=str(out / "prompt"), data=data)


def prompt_sentence(part: PromptPart) -> str:
    """The part of the verdict."""
    found = {name: spread_of(part.runs, DATASET, name, SHOTS[-1]) for name in ("template", MAIN_METHOD)}
    before, after = (one.mean if one else 0.0 for one in found.values())
    return (
        f"From {SHOTS[-1]} labelled pictures of each of {part.results['sizes']['classes']} kinds of clothes it learns "
        f"prompts that name {after:.0f}% of {part.results['sizes']['test']:,} others, {before:.0f}% before."
    )


def prompt_section(part: PromptPart) -> Group:
    """The part of the report."""
    recipe, test = part.recipe, part.results["adapted"]["test"]
    tiles = []
    for shots in SHOTS:
        found = spread_of(part.runs, DATASET, MAIN_METHOD, shots)
        rival = spread_of(part.runs, DATASET, "coop", shots)
        note = f"{METHODS['coop'][0]} {rival.mean:.0f}%" if rival else ""
        label = f"{shots} picture{'s' if shots > 1 else ''} per class"
        tiles.append(Tile(label, found.mean if found else None, "%", note))
    note = f"{PROTOCOL} Here there is one seed: differences of a few points are noise."
    blocks: list[Block] = [
        Tiles(tiles),
        fewshot_curves(part.runs, title="More pictures, better names", note=note),
        fewshot_table(part.runs, DATASET, title="Same pictures, same test set"),
        Details(f"The recipe of {recipe.out}", [Code(to_yaml(recipe), language="yaml")]),
    ]
    if test["top1"] < test["zero_shot"]:
        told = (
            "On top of the domain link the prompts name fewer pictures right than hand templates do, "
            f"{test['top1']:.1f}% against {test['zero_shot']:.1f}%: the link was itself trained on these classes."
        )
        blocks.insert(0, Text(told, tone="caution"))
    lead = (
        "A few labelled pictures turn the model into a classifier. All weights stay frozen: what is learned are tokens "
        "in front of the class names, and a small vector for each class. "
        f"The figures here are on the bare base. The prompts in {recipe.out} are learned on top of the domain link in "
        f"{recipe.base}, so that they go together with it: they name {test['top1']:.1f}% of the test pictures, hand "
        f"templates on that link {test['zero_shot']:.1f}%. "
        f"Where its queries look and what it mistakes shows {recipe.out}.training/report.html."
    )
    return Group(f"Few pictures: {NAME[0].lower()}{NAME[1:]}", blocks, lead=lead)
