"""Teach a model your classes from a few pictures of each, and name new pictures.

    python examples/prompt.py CLASS_FOLDER PICTURE...

CLASS_FOLDER holds a folder of pictures per class, at least 5 in each.
"""

from __future__ import annotations

import argparse

import trimtab
from trimtab.config import LabelSource, PromptData, PromptRecipe


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="CLASS_FOLDER", help="with a folder of pictures per class")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="to be named")
    parser.add_argument("--base", default="starter")
    parser.add_argument("--out", default="runs/example-prompt", help="the adapted folder to write")
    chosen = parser.parse_args(arguments)

    recipe = PromptRecipe(
        base=chosen.base,
        data=PromptData(train=(LabelSource(chosen.folder),), shots=4, allow_fewer=True),
        out=chosen.out,
    )
    outcome = trimtab.adapt(recipe)
    assert outcome is not None  # it is None in further processes only
    print(f"named right in validation: {outcome['validation']['top1']:.0f}%")
    classifier = trimtab.load(outcome["folder"]).classifier()
    for picture, best in zip(chosen.pictures, classifier.predict(chosen.pictures, top_k=3), strict=True):
        print(picture, *(f"{label} {score:.0%}" for label, score in best), sep="  ")


if __name__ == "__main__":
    main()
