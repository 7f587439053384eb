"""Which layers of the student, with or without prefix, and what English-English pairs cost: by the closed form alone.

    python benchmarks/language_layers.py --out benchmarks/results/language_layers.json

The student passes a sample of the recipe's pairs once and all of its layers are pooled, so that any set of layers can
be tried without encoding anew. Each row solves the closed-form start (no training follows) on three draws of half
of the sample, and is judged by translation match on the recipe's validation pairs: mean and standard deviation over the
draws. `cost` is what the encoder has to compute for the row, in layers: one that stops at layer 8 of 12 costs 8.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters.ridge import RidgeSums
from trimtab.config import LanguageRecipe, load_recipe
from trimtab.evaluation.matching import translation_match
from trimtab.files import write_json, write_text
from trimtab.precision import fast_inference
from trimtab.recipes.language import RIDGE
from trimtab.recipes.sources import drawing_probability, prepare
from trimtab.towers.hf import load_base
from trimtab.towers.text_encoder import TextEncoder

RECIPE = Path(__file__).parents[1] / "recipes" / "language-zh.yaml"
LAYERS = [[12], [10], [8], [6], [6, 10], [8, 12], [2, 10, 12], [2, 4, 6, 8, 10, 12]]
PREFIXES = ("", "query: ")
DRAWS = 3
ENGLISH_SHARE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs of the sample")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language_layers.json"))
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    assert isinstance(recipe, LanguageRecipe)
    text = prepare(recipe)
    rng = np.random.default_rng(recipe.seed)
    probability = drawing_probability(text.train, recipe.data)
    sample = rng.choice(len(text.train), min(arguments.pairs, len(text.train) // 2), replace=False, p=probability)
    targets, english = ([side[i] for i in sample] for side in (text.train.targets, text.train.english))
    base = load_base(recipe.base)
    with fast_inference(base.device):
        teacher = torch.from_numpy(base.encode_text([*english, *text.validation.english]))
    own = english[: round(ENGLISH_SHARE * len(english) / 2)]  # English-English pairs: a tenth of half of the sample
    rows = []
    for prefix in PREFIXES:
        student = TextEncoder.load(recipe.student.name, prefix=prefix)
        texts = [*targets, *text.validation.targets, *text.validation.english, *own]
        pooled = pool(student, texts)  # (texts, layers, H)
        parts = pooled.split([len(targets), len(text.validation), len(text.validation), len(own)])
        for layers in LAYERS if prefix == PREFIXES[0] else [LAYERS[-2]]:
            for share in (0.0, ENGLISH_SHARE) if layers == LAYERS[-2] and not prefix else (0.0,):
                x = [part[:, layers].flatten(1) for part in parts]
                figures = solve(x, teacher, text.validation.english, share > 0)
                rows.append({"layers": layers, "prefix": prefix, "english_share": share, **figures})
                print(rows[-1], flush=True)
                facts = {"pairs": len(targets), "validation_pairs": len(text.validation)}
                write_json(arguments.out, {**facts, "rows": rows})  # after every row: a long run may be stopped
                write_text(arguments.out.with_suffix(".md"), as_table(rows))


def pool(student: TextEncoder, texts: Sequence[str]) -> Tensor:
    """Means over tokens of every layer, (texts, L + 1, H) float32."""
    layers = range(student.num_layers + 1)
    result = torch.empty(len(texts), len(layers), student.hidden_size)
    for start in range(0, len(texts), 2048):
        with fast_inference(student.device):
            states = student.token_states(texts[start : start + 2048], layers, batch_size=128)
        means = np.stack([one.mean(axis=0) for one in states])
        result[start : start + len(states)] = torch.from_numpy(means).view(len(states), len(layers), -1)
    return result


def solve(parts: Sequence[Tensor], teacher: Tensor, groups: Sequence[str], with_english: bool) -> dict[str, float]:
    """Match of both languages after the closed form on each draw.

    Args:
        parts: inputs of training targets, validation targets, validation English, English-English pairs.
        teacher: features of the training and of the validation English.
    """
    train, *held_out, own = parts
    target, held = teacher.split([len(train), len(teacher) - len(train)])
    mean, std = train.mean(dim=0), train.std(dim=0)
    matches: dict[str, list[float]] = {"match": [], "english_match": []}
    for draw in range(DRAWS):
        chosen = torch.from_numpy(np.random.default_rng(draw).permutation(len(train))[: len(train) // 2])
        sums = RidgeSums(train.shape[1], target.shape[1])
        sums.add((train[chosen] - mean) / std, target[chosen] - target.mean(dim=0))
        if with_english:
            sums.add((own - mean) / std, target[: len(own)] - target.mean(dim=0))
        weight, bias = sums.solve(RIDGE)
        for name, inputs in zip(matches, held_out, strict=True):
            found = ((inputs - mean) / std).double() @ weight.T + bias + target.mean(dim=0)
            matches[name].append(translation_match(found.float().numpy(), held.numpy(), groups=groups).accuracy)
    means = {name: statistics.fmean(values) for name, values in matches.items()}
    return {**means, "match_spread": statistics.stdev(matches["match"])}


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| layers of the student | prefix | English pairs | cost | match, Chinese | match, English |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        layers, prefix = ", ".join(map(str, row["layers"])), f"`{row['prefix']}`" if row["prefix"] else "none"
        lines.append(
            f"| {layers} | {prefix} | {100 * row['english_share']:.0f}% | {max(row['layers'])} "
            f"| {row['match']:.1f} ± {row['match_spread']:.1f} | {row['english_match']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
