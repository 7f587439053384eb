"""What each choice of the language link is worth: one change at a time, same pairs, same budget, same seed.

    python benchmarks/language_study.py --out benchmarks/results/language_study.json

Every row trains `recipes/language-zh.yaml` on a share of its pairs with a smaller budget and one change, and is judged
by translation match on validation pairs alone; no test picture is opened. About 15 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from trimtab.config import load_recipe
from trimtab.files import write_json, write_text
from trimtab.precision import tune_allocator
from trimtab.recipes.adapt import adapt

RECIPE = Path(__file__).parents[1] / "recipes" / "language-zh.yaml"

# A share of the recipe's pairs, so that a row takes about a minute; small differences may change with all of them.
SMALLER = [
    "data.train=[{path: cedict, limit: 16000}, 'cldr:zh', {path: 'cataclysm:zh_CN', limit: 8000}, "
    "{path: imagenet21k, limit: 4000, weight: 0.5}]",
    "data.phrases=12000",
]

VARIANTS: dict[str, list[str]] = {
    "recipe as it is": [],
    "closed-form map only": ["training.learning_rate=1e-12"],
    "objective: MSE only": ["objective.infonce=0", "objective.mse=1"],
    "objective: cosine only": ["objective.infonce=0", "objective.mse=0", "objective.cosine=1"],
    "objective: InfoNCE only": ["objective.mse=0"],
    "objective: with Gram term": ["objective.gram=10"],
    "start: random": ["adapter.init=random"],
    "student: last layer only": ["student.layers=[-1]"],
    "adapter: one layer": ["adapter.layers=1"],
    "adapter: width 192": ["adapter.width=192", "adapter.heads=3"],
    "pooling: attention": ["adapter.pooling=attention"],
    "pairs: no composed phrases": ["data.phrases=0"],
    "pairs: dictionary alone": ["data.train=[{path: cedict, limit: 24000}]", "data.phrases=0"],
    "pairs: no English names": [
        "data.train=[{path: cedict, limit: 16000}, 'cldr:zh', {path: 'cataclysm:zh_CN', limit: 8000}]"
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language_study.json"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=40_000, help="pairs per epoch")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="names of rows")
    arguments = parser.parse_args()
    tune_allocator()
    budget = [
        *SMALLER,
        f"training.epochs={arguments.epochs}",
        f"data.epoch_pairs={arguments.pairs}",
        "training.trackers=[]",
    ]
    # One validation set for all rows: what the recipe's own sources leave aside, written once.
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        validation = shared_validation(Path(scratch))
        for name in arguments.only:
            started = time.monotonic()
            overrides = [*budget, f"data.validation=[{validation}]", f"out={scratch}/{len(rows)}", *VARIANTS[name]]
            outcome = adapt(load_recipe(RECIPE, overrides))
            assert outcome is not None
            figures = outcome["validation"]
            rows.append(
                {
                    "change": name,
                    "match": figures["match"],
                    "english_match": figures["english_match"],
                    "cosine": figures["cosine"],
                    "collapse": figures["collapse"],
                    "pairs": outcome["pairs"],
                    "training_seconds": outcome["seconds"]["training"],
                    "seconds": time.monotonic() - started,
                }
            )
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
            write_json(arguments.out, {"budget": budget, "rows": rows})
    write_text(arguments.out.with_suffix(".md"), as_table(rows))


def shared_validation(folder: Path) -> Path:
    """Validation pairs of the recipe, as a file that every row keeps out of its training."""
    import csv

    from trimtab.recipes.sources import prepare

    text = prepare(load_recipe(RECIPE, SMALLER)).validation
    path = folder / "validation.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["target", "english"])
        writer.writerows(zip(text.targets, text.english, strict=True))
    return path


def as_table(rows: list[dict[str, float | str]]) -> str:
    lines = [
        "| change | match, Chinese | match, English through the adapter | mean cosine | training s |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['change']} | {row['match']:.1f} | {row['english_match']:.1f} | {row['cosine']:.3f} "
        f"| {row['training_seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
