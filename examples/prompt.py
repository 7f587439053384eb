"""Teach a model your classes from a few pictures of each, and name new pictures.

    python examples/prompt.py CLASS_FOLDER PICTURE...

CLASS_FOLDER holds a folder of pictures per class, at least 5 in each.
"""

from __future__ import annotations

import sys

import trimtab
from trimtab.config import LabelSource, PromptData, PromptRecipe


def main() -> None:
    folder, *pictures = sys.argv[1:]
    recipe = PromptRecipe(
        data=PromptData(train=(LabelSource(folder),), shots=4, allow_fewer=True), out="runs/example-prompt"
    )
    outcome = trimtab.adapt(recipe)
    assert outcome is not None  # it is None in further processes only
    print(f"named right in validation: {outcome['validation']['top1']:.0f}%")
    classifier = trimtab.load(outcome["folder"]).classifier()
    for picture, best in zip(pictures, classifier.predict(pictures, top_k=3), strict=True):
        print(picture, *(f"{label} {score:.0%}" for label, score in best), sep="  ")


if __name__ == "__main__":
    main()
