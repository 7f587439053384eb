"""What a run of the domain link tells people: a page, a table of the hardest pairs, and the model card."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import trimtab
from trimtab.adapters.cards import card_head, shown_name
from trimtab.config import DomainRecipe, to_yaml
from trimtab.data.pairs import ImageTextPairs
from trimtab.evaluation.blocks import Block, Facts, Tile
from trimtab.evaluation.domain_pairs import cleaning_table, difficulty_histogram, hardest_pairs
from trimtab.evaluation.domain_summaries import alpha_lines, training_curves
from trimtab.evaluation.report import Report, write_report
from trimtab.evaluation.summaries import reproducibility
from trimtab.files import atomic_path
from trimtab.recipes.domain_methods import METHODS
from trimtab.recipes.domain_pairs import readable
from trimtab.recipes.folders import training_folder
from trimtab.towers.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from trimtab.recipes.domain import Hardness

HARDEST_FILE = "hardest-pairs.csv"
_LISTED = 1000
_SHOWN = 24
_AT_ONCE = 50  # pairs that are compared with all captions
_ROWS = {"full": "full", "lora": "lora", "probe": "linear_probe"}


def write_domain_report(
    recipe: DomainRecipe, pairs: ImageTextPairs, hardness: Hardness, outcome: dict[str, Any], base: DualEncoder
) -> Path:
    """Write page and table beside the checkpoints; returns the page."""
    folder = training_folder(recipe.out)
    hardest = hardest_rows(pairs, hardness)
    _write_table(folder / HARDEST_FILE, hardest)
    for entry, pair in zip(hardest[:_SHOWN], _order(hardness), strict=False):
        entry["image"] = readable(pairs.images[pairs.image_index[pair]])
    html, _ = write_report(folder, _report(recipe, hardness, hardest[:_SHOWN], outcome, base))
    return html


def hardest_rows(pairs: ImageTextPairs, hardness: Hardness) -> list[dict[str, Any]]:
    """The hardest pairs as things are now, hardest first, each with the caption that the model puts above its own."""
    order = _order(hardness)[:_LISTED]
    rows = []
    for start in range(0, len(order), _AT_ONCE):
        some = order[start : start + _AT_ONCE]
        images, captions = pairs.image_index[some], pairs.caption_index[some]  # (b,)
        cosines = hardness.images[torch.from_numpy(images)] @ hardness.texts.T  # (b, U)
        own = cosines[torch.arange(len(some)), torch.from_numpy(captions)]
        right = torch.from_numpy(pairs.belong(images, np.arange(len(pairs.captions))))
        value, best = cosines.masked_fill(right, -torch.inf).max(dim=1)
        for at, pair in enumerate(some):
            file, row = pairs.origin(pair)
            rows.append(
                {
                    "file": file,
                    "row": row,
                    "image": str(pairs.images[images[at]]),
                    "caption": pairs.captions[captions[at]],
                    "prefers": pairs.captions[int(best[at])] if value[at] >= own[at] else "",
                    "before": float(hardness.before[pair]),
                    "now": float(hardness.now[pair]),
                    "drawn": int(hardness.drawn[pair]),
                }
            )
    return rows


def _order(hardness: Hardness) -> list[int]:
    return np.argsort(-hardness.now, kind="stable").tolist()


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _report(
    recipe: DomainRecipe,
    hardness: Hardness,
    hardest: list[dict[str, Any]],
    outcome: dict[str, Any],
    base: DualEncoder,
) -> Report:
    row = _ROWS.get(recipe.method) or ("adapter_hard" if recipe.bank.enabled else "adapter")
    best, before, general = outcome["validation"], outcome["validation_before"], outcome.get("general")
    share = 100 * outcome["trained_parameters"] / outcome["base_parameters"]
    seconds = outcome["seconds"]
    verdict = (
        f"{best.get('top1', 0):.1f}% of the validation pictures find a caption of theirs first, {before['top1']:.1f}% "
        f"before. What was trained is {share:.3g}% of the base's size."
    )
    tiles = [
        Tile("Validation top-1", best.get("top1"), "%", f"picture finds its caption; before {before['top1']:.1f}%"),
        Tile("Validation mR", best.get("mR"), "%", f"mean recall, both directions; before {before['mR']:.1f}%"),
        Tile("Trained parameters", outcome["trained_parameters"], "", f"{share:.3g}% of the base's"),
        Tile("Time", seconds["total"] / 60, "min", f"training {seconds['training'] / 60:.1f} min"),
    ]
    if general:
        lost = general["forgetting"]["points"]
        verdict += f" General ability {'fell' if lost > 0 else 'rose'} by {abs(lost):.1f} points."
        tiles.insert(2, Tile("Forgotten", lost, "points", "mean over the general sets"))
    measure = recipe.bank.difficulty
    sections: list[Block | None] = [
        training_curves(
            {row: outcome["history"]},
            terms={"i2t": "Loss, image to text", "t2i": "Loss, text to image"},
            metrics={"top1": "Validation top-1, %", "mR": "Validation mR, %"},
            kept=(best["step"], "kept") if best else None,
        ),
        alpha_lines(
            [{**point, "row": row} for point in outcome["alpha"]], domain="validation top-1, %", title="The dial alpha"
        )
        if outcome.get("alpha")
        else None,
        difficulty_histogram(
            hardness.before,
            hardness.now,
            label=f"difficulty ({'loss' if measure == 'learnability' else measure})",
            title="How hard the training pairs are",
        ),
        hardest_pairs(
            hardest, scale=1.0, note=f"`{HARDEST_FILE}` beside this page has more of them, with the same columns."
        ),
        cleaning_table(outcome["counts"]),
        Facts([(f"{name}: {side}", value) for side, found in _general(outcome) for name, value in found.items()],
              title="General sets") if general else None,
        reproducibility(
            {
                "seed": recipe.seed,
                "base": f"{recipe.base}, {base.fingerprint[:16]}",
                "steps": outcome["steps"],
                **{f"gate, {name}": value for name, value in outcome.get("gate", {}).items()},
                **_of_memory(outcome.get("memory")),
                "trimtab": trimtab.__version__,
                "torch": torch.__version__,
                **{f"{name} (s)": round(value) for name, value in seconds.items()},
            },
            command="trimtab adapt RECIPE.yaml",
            recipe=to_yaml(recipe),
        ),
    ]  # fmt: skip
    return Report(
        f"A base learns a domain: {METHODS[recipe.method].label}",
        verdict,
        tiles,
        [section for section in sections if section is not None],
        context=f"trimtab adapt, {recipe.out}",
        footer=f"trimtab {trimtab.__version__}, seed {recipe.seed}",
    )


def _of_memory(memory: dict[str, Any] | None) -> dict[str, Any]:
    if memory is None:
        return {}
    return {
        "memory, pictures": memory["pictures"],
        "memory, validation top-1 without and with it": f"{memory['without']['top1']:.1f}, "
        f"{memory['with']['top1']:.1f}; {'kept' if memory['kept'] else 'not kept'}",
    }


def _general(outcome: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    return [(side, outcome["general"][side]) for side in ("before", "after")]


def model_card(recipe: DomainRecipe, metrics: dict[str, float], outcome: dict[str, Any]) -> str:
    """What a reader of the folder wants to know first."""
    name = Path(recipe.out).name
    before = outcome["validation_before"]
    figures = "\n".join(
        f"| {key} | {f'{before[key]:.3g}' if key in before else '–'} | {value:.3g} |" for key, value in metrics.items()
    )
    share = 100 * outcome["trained_parameters"] / outcome["base_parameters"]
    base = shown_name(recipe.base)
    relation = "adapter" if recipe.method == "adapter" else "finetune"
    if recipe.method == "adapter":
        what = (
            f"Adapters for a business domain, beside layers of the frozen base `{base}`. This folder holds the "
            "adapters alone; the base is\nloaded from its own place and checked by its fingerprint. `model.alpha` is a "
            "dial: 0 is the base, 1 the model as trained."
        )
        if gate := outcome.get("gate"):
            what += (
                f" A {gate['kind']} gate leaves pictures\nthat do not look like the domain to the base; "
                f"{gate['validation']:.0f}% of the validation pictures get all of the adapters."
            )
        if (memory := outcome.get("memory")) and memory["kept"]:
            what += (
                f" It remembers {memory['pictures']:,} training\npictures: what comes near them is moved towards their "
                "captions."
            )
    else:
        what = f"The base `{base}`, adapted to a business domain by {METHODS[recipe.method].label}."
    return f"""{card_head(["clip", "domain", recipe.method], models=[recipe.base], relation=relation)}
# {name}

{what} It was trained on {outcome["pairs"]:,} pairs of {outcome["images"]:,} pictures and {outcome["captions"]:,}
captions; {outcome["trained_parameters"]:,} numbers were trained, {share:.3g}% of as many as the base has.

```python
import trimtab
model = trimtab.load("{name}")
model.similarity(["picture.jpg"], ["..."])
```

## Validation ({outcome["steps"]} steps, seed {recipe.seed})

| figure | before | after |
|---|---:|---:|
{figures}

`top1` is how many percent of the validation pictures find a caption of theirs first among all of validation, `mR` mean
recall at 1, 5 and 10 in both directions, `forgetting` the points lost on general pictures. The weights were chosen by
`{outcome["judged_by"]}`, so measure on other data before you quote it.

## Limits

It knows the kinds of pictures and captions it was trained on, and the base's own limits remain. Check it on your own
data with `trimtab evaluate` before you rely on it.
"""
