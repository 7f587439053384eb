"""What is lost when only the best classes of a picture get prompts of its own (`instance.top_k`), and what is saved.

    python benchmarks/top_k.py

Two tasks out of packages. Emoji by their names are many classes: two drawings of each to learn from, a third to choose
by, OpenMoji's to test. There a prompt that was trained with the best 3 classes of each picture is tested with more of
them, up to all. Emoji by their groups are few enough to train with all classes, too.

The recipe is that of the few-shot comparison, as it is and without class vectors (`general_instance`), where a
picture's own prompts have more to say. Seconds are those of the processor, of scores alone; give it one thread
(OMP_NUM_THREADS=1). A part that has ended is kept in the work folder, under `top-k-parts`, and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fewshot import RECIPE, recipe_for
from fewshot_sets import SETS, emoji_names

from trimtab.adapters.adapted import load
from trimtab.config import PromptRecipe
from trimtab.data.shots import draw_shots
from trimtab.files import write_json, write_text
from trimtab.recipes.fewshot import FewShotData, read_fewshot
from trimtab.recipes.fewshot_methods import CHANGES
from trimtab.recipes.prompt_features import PictureFeatures
from trimtab.recipes.prompt_fit import FittedPrompt, LabelledFeatures, fit_prompt
from trimtab.towers.dual_encoder import DualEncoder

NAMES, TESTED, DRAWINGS = 1000, 150, 2  # classes, how many of them are tested, pictures of each to learn from
SEEDS, SHOTS = (1, 2, 3), 16  # of the groups
PARTS = (  # task, method, layer at which the shift joins
    ("names", "structured", 5),
    ("names", "general_instance", 5),
    ("names", "general_instance", 0),
    ("groups", "structured", 5),
    ("groups", "general_instance", 5),
)
ALL = None
RESULT = Path(__file__).parent / "results" / "top_k.json"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-fewshot"), help="gets tables and pictures")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    base = load("starter")
    found: dict[str, list[Row]] = {}
    for part in PARTS:
        name = "-".join(map(str, part))
        kept = arguments.work / "top-k-parts" / base.fingerprint[:12] / f"{name}.json"
        if kept.is_file():
            found[name] = json.loads(kept.read_text(encoding="utf-8"))
            continue
        found[name] = measure(base, arguments.work, *part)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, found[name])
        print(name, found[name], flush=True)
    write_json(arguments.out, found)
    write_text(arguments.out.with_suffix(".md"), table(found))


def measure(base: DualEncoder, work: Path, task: str, method: str, layer: int) -> list[Row]:
    """Emoji names: trained with the best 3 classes of each picture, tested with more. Groups: trained with all classes
    or with the best 3, and tested with both."""
    rows: list[Row] = []
    names = task == "names"
    photos = emoji_names(work, NAMES, TESTED) if names else SETS["emoji"](work, None)
    for seed in SEEDS[:1] if names else SEEDS:
        for trained in (3,) if names else (ALL, 3):
            changes = [f"prompt.instance.layer={layer}", f"prompt.instance.top_k={trained or 'null'}"]
            recipe = recipe_for(RECIPE, photos, [*changes, *(["data.views=0"] if names else [])])
            data = read_fewshot(recipe)
            shots = DRAWINGS if names else SHOTS
            fitted, test = fit(base, CHANGES[method](recipe), data, shots, seed)
            asked = (ALL, 100, 30, 10, 3, 0) if names else (ALL, 3, 0)
            found = [tested(fitted, test, top_k) for top_k in asked]
            with_all = found[0][1]
            for row, answers in found:
                same = 100 * float((answers == with_all).mean())
                rows.append({"trained": trained, "seed": seed, "same_as_all": same, **row})
    return rows


def fit(
    base: DualEncoder, recipe: PromptRecipe, data: FewShotData, shots: int, seed: int
) -> tuple[FittedPrompt, LabelledFeatures]:
    """A prompt on one draw, and the test pictures."""
    draw = draw_shots(data.train, data.validation, shots, seed)
    views: dict[str, Any] = {"views": recipe.data.views, "options": recipe.data.augmentation}
    train, validation, test = (
        LabelledFeatures(PictureFeatures(base, part.images, **more).fill(), part.labels)
        for part, more in ((draw.train, views), (draw.validation, {}), (data.test, {}))
    )
    return fit_prompt(base, replace(recipe, seed=seed), train, validation, draw.train.classes, seed), test


def tested(fitted: FittedPrompt, test: LabelledFeatures, top_k: int | None) -> tuple[Row, np.ndarray]:
    """Top-1, and the answers (N,), when so many classes of a picture are scored with its own prompts; None: all."""
    prompt = fitted.prompt
    config = prompt.config
    assert config.instance is not None
    instance = None if top_k == 0 else replace(config.instance, top_k=top_k)
    prompt.config = replace(config, instance=instance)
    started = time.process_time()
    answers = fitted.logits(test.features).argmax(axis=1)
    seconds = time.process_time() - started
    prompt.config = config
    row = {
        "top_k": top_k, "classes": len(fitted.classes), "n": len(test), "seconds": round(seconds, 2),
        "top1": 100 * float((answers == test.labels).mean()),
    }  # fmt: skip
    return row, answers


def table(found: dict[str, list[Row]]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Prompts of their own for the best classes of a picture alone",
        "",
        "Written by `benchmarks/top_k.py`. The best classes are those that score highest without the Instance part; "
        "`none` is without it.",
        "",
        "## Emoji by name, trained with the best 3",
        "",
        "| method | joins at layer | scored with own prompts | top-1 | same answer as with all | ms a picture |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    parts = {tuple(name.split("-")): rows for name, rows in found.items()}
    for (task, method, layer), rows in parts.items():
        for row in rows if task == "names" else ():
            lines.append(
                f"| {method} | {layer} | {words(row['top_k'])} | {row['top1']:.1f} | {row['same_as_all']:.1f}% "
                f"| {1000 * row['seconds'] / row['n']:.0f} |"
            )
    lines += [
        "",
        f"{NAMES:,} classes, {TESTED} test pictures, one seed.",
        "",
        "## Emoji by group",
        "",
        "| method | joins at layer | trained with | tested with | top-1, mean and spread over seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    for (task, method, layer), rows in parts.items():
        for trained, top_k in ((ALL, ALL), (ALL, 3), (3, ALL), (3, 3), (ALL, 0), (3, 0)) if task == "groups" else ():
            values = [row["top1"] for row in rows if (row["trained"], row["top_k"]) == (trained, top_k)]
            mean = f"{np.mean(values):.1f} ± {np.std(values):.1f}"
            lines.append(f"| {method} | {layer} | {words(trained)} | {words(top_k)} | {mean} |")
    return "\n".join([*lines, "", f"{SHOTS} shots, {len(SEEDS)} seeds.", ""])


def words(top_k: int | None) -> str:
    """How a table says it."""
    return "all" if top_k is ALL else f"best {top_k}" if top_k else "none"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
