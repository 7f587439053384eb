"""Few-shot methods side by side on several sets of pictures: the same shots, views, validation pictures and test sets.

    python benchmarks/fewshot.py sweep --grocery path/to/grocery
    python benchmarks/fewshot.py new --grocery path/to/grocery        # base-to-new classes
    python benchmarks/fewshot.py shares --grocery path/to/grocery     # 12.5, 25, 50 and 100% of the training pictures
    python benchmarks/fewshot.py table                                # write the tables again

Every finished run is a line of a file in `benchmarks/results`, and is not repeated. The photos of groceries (arXiv
1901.00711) are not fetched: without `--grocery` leave its two sets out with `--sets fashion,emoji,tuxpaint`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fewshot_sets import SETS, PhotoSet
from fewshot_tables import report
from options import numbers

from trimtab.config import PromptRecipe, load_recipe
from trimtab.errors import TrimtabError
from trimtab.files import write_text
from trimtab.recipes.fewshot import Plan, fewshot, read_runs
from trimtab.recipes.fewshot_methods import METHODS

RECIPE = Path(__file__).parents[1] / "recipes" / "prompt-fewshot.yaml"
RESULTS = Path(__file__).parent / "results"
FILES = {name: RESULTS / f"fewshot{suffix}.jsonl" for name, suffix in
         (("sweep", ""), ("new", "_new"), ("shares", "_shares"))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*FILES, "table"])
    parser.add_argument("--grocery", type=Path, help="folder of the photos of groceries")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--shots", default="1,2,4,8,16", type=numbers)
    parser.add_argument("--seeds", default="1,2,3", type=numbers)
    parser.add_argument("--methods", default="")
    parser.add_argument("--shares", default="0.125,0.25,0.5,1", help="of the training pictures, for `shares`")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for the recipe")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-fewshot"), help="gets tables and pictures")
    parser.add_argument("--out", type=Path, help="instead of the file in benchmarks/results")
    arguments = parser.parse_args()
    out = arguments.out or FILES.get(arguments.what)
    sets = arguments.sets.split(",")
    if unknown := set(sets) - SETS.keys():
        parser.error(f"no such set: {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    try:
        for name in sets if arguments.what != "table" else ():
            photos = SETS[name](arguments.work, arguments.grocery)
            recipe = recipe_for(arguments.recipe, photos, arguments.set)
            seeds, shots = arguments.seeds, arguments.shots
            if arguments.what == "sweep":
                methods = tuple(arguments.methods.split(",")) if arguments.methods else tuple(METHODS)
                fewshot(recipe, Plan(shots, seeds, methods, name), out, progress=say)
            elif arguments.what == "new":
                from fewshot_new import base_to_new

                usual = "template,coop,structured,structured_context"
                methods = tuple((arguments.methods or usual).split(","))
                base_to_new(recipe, name, methods, seeds, out, say)
            elif name == "grocery":
                from fewshot_shares import shares

                methods = tuple(arguments.methods.split(",")) if arguments.methods else ()
                shares(recipe, methods, [float(part) for part in arguments.shares.split(",")], seeds, out, say)
    except TrimtabError as error:
        sys.exit(f"error: {error}")
    if arguments.out is None:
        found = {name: read_runs(path) for name, path in FILES.items()}
        write_text(RESULTS / "fewshot.md", report(found["sweep"], found["new"], found["shares"]))


def recipe_for(path: Path, photos: PhotoSet, changes: list[str]) -> PromptRecipe:
    """The recipe, reading one set."""
    recipe = load_recipe(path, [*photos.overrides(), *changes])
    assert isinstance(recipe, PromptRecipe)
    return recipe


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
