"""Choices of `recipes/domain-grocery.yaml`, one change at a time, with the test split closed.

    python benchmarks/domain_study.py --data path/to/grocery --seeds 1,2

Every row trains the recipe with one change, and is judged on training pictures in scenes of their own, which are held
out (`domain_scenes`), and on those of validation: by the share that gets its own fine class. Rows with a quarter of the
pairs draw as many of them, in four times the epochs. Rows that stand in the output file already, with the same recipe,
are not repeated. docs/domain-measured.md has what became of the best.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from domain import RECIPE, Grocery, append, is_done, make_job, read_runs, require_lists, run, scenes_of
from domain_tables import Run, of_last_setting, shown, spread
from options import numbers

from trimtab.adapters.adapted import load
from trimtab.config import load_recipe
from trimtab.errors import TrimtabError
from trimtab.files import write_text

AS_IT_IS = "recipe as it is"
CROPPED = "cached maps mirrored, and cropped to 60%"
CROP = "data.map_augmentation={crop_min: 0.6, flip: true}"
DESCRIBED = "captions: names and descriptions"
TEXT = ", {tower: text, kind: bottleneck, first: -2, width: 64}"
IMAGE_LORA = "lora.targets=[linear1, linear2, expand.0, project.0]"
WIDER_LORA = (IMAGE_LORA, "lora.rank=28", "lora.alpha=56")


def conv(first: int, width: int = 128, more: str = "") -> str:
    """Adapters as the recipe has them, elsewhere, of another width or with more of them."""
    groups = (
        f"{{tower: image, kind: conv, first: {first}, last: -1, width: {width}}}, "
        "{tower: image, kind: bottleneck, width: 64}"
    )
    return f"adapters=[{groups}{more}]"


@dataclass(frozen=True)
class Variant:
    """One row of the study.

    Attributes:
        row: of `domain.ROWS`, that is trained.
        changes: to it.
        share: of the training pairs.
    """

    row: str
    changes: tuple[str, ...] = ()
    share: float = 1.0


def adapters(*changes: str, share: float = 1.0) -> Variant:
    return Variant("adapter_hard", changes, share)


def rates(name: str, row: str, *values: str) -> dict[str, Variant]:
    """A baseline at several learning rates, of which the comparison has 5e-3."""
    return {f"{name}, rate {value}": Variant(row, (f"training.learning_rate={value}",)) for value in values}


def cropped(variants: dict[str, Variant]) -> dict[str, Variant]:
    """The same on maps that are cropped, as in an earlier recipe: most was tried before that was changed."""
    return {f"{CROPPED}: {name}": Variant(one.row, (CROP, *one.changes), one.share) for name, one in variants.items()}


BANK = {
    "no bank: pairs alike, no hard negatives": Variant("adapter"),
    "hard negatives alone: pairs alike": Variant("adapter_negatives"),
    "bank: gamma 2": adapters("bank.gamma=2"),
    "bank: eps 0.001, gamma 0.5": adapters("bank.eps=0.001", "bank.gamma=0.5"),
    "bank: difficulty by rank": adapters("bank.difficulty=rank"),
    "bank: difficulty by loss": adapters("bank.difficulty=loss"),
    "bank: learnability": adapters("bank.difficulty=learnability"),
    "bank: the hardest 5% count no more than the next": adapters("bank.tail=0.05"),
}
PLACES = {
    "adapters from block 5": adapters(conv(5)),
    "adapters from block 11": adapters(conv(11)),
    # A gate wants texts to stay where they are.
    "adapters in the text tower too, no gate": adapters(conv(8, more=TEXT), "gate=none"),
    "adapters half as wide": adapters(conv(8, 64)),
    "adapters twice as wide": adapters(conv(8, 256)),
}
STEPS = {
    "logit_scale 20": adapters("objective.logit_scale=20"),
    "label smoothing 0.1": adapters("objective.label_smoothing=0.1"),
    "label smoothing 0.3": adapters("objective.label_smoothing=0.3"),
    "weight decay 0.5": adapters("training.weight_decay=0.5"),
    "weights at the end, no mean of those on the way": adapters("training.bell=null"),
    "AdamW, rate 5e-3": adapters("training.optimizer=adamw", "training.learning_rate=5e-3"),
    "batches of 16, rate 7e-3": adapters("training.batch_size=16", "training.learning_rate=7e-3"),
    "20 epochs": adapters("training.epochs=20"),
}
SHARES = {
    "half of the pairs": adapters(share=0.5),
    "a quarter of the pairs": adapters(share=0.25),
    "a quarter, half the steps": adapters("training.epochs=30", share=0.25),
    "a quarter, twice the steps": adapters("training.epochs=120", share=0.25),
    "a quarter, adapters half as wide": adapters(conv(8, 64), share=0.25),
}
VARIANTS: dict[str, Variant] = {
    AS_IT_IS: adapters(),
    "cached maps as they are": adapters("data.map_augmentation={}"),
    "cached maps mirrored, and cropped to 80%": adapters("data.map_augmentation={crop_min: 0.8, flip: true}"),
    CROPPED: adapters(CROP),
    "cached maps mirrored, cropped to 40% and erased": adapters(
        "data.map_augmentation={crop_min: 0.4, flip: true, erase: 0.5}"
    ),
    **BANK,
    **PLACES,
    **STEPS,
    **SHARES,
    "continual fine-tuning, pairs alike": Variant("full"),
    "continual fine-tuning, twice the rate": Variant("full", ("training.learning_rate=6e-4",)),
    "continual fine-tuning, pictures mirrored alone": Variant(
        "full", ("data.augmentation={crop_min: 1, flip: true, colour: 0}",)
    ),
    "continual fine-tuning, with smoothing and the mean of weights": Variant(
        "full", ("objective.label_smoothing=0.2", "training.bell=[0.8, 0.2]")
    ),
    "continual fine-tuning with a quarter": Variant("full", share=0.25),
    **rates("LoRA", "lora", "2e-3", "5e-3", "1e-2"),
    "LoRA in the image tower alone": Variant("lora", (IMAGE_LORA,)),
    "LoRA in the image tower alone, as many weights as the adapters, rate 2e-3": Variant(
        "lora", (*WIDER_LORA, "training.learning_rate=2e-3")
    ),
    "LoRA in the image tower alone, as many weights as the adapters, rate 5e-3": Variant("lora", WIDER_LORA),
    **rates("linear maps on both towers", "probe", "2e-3", "5e-3", "1e-2", "2e-2"),
    **cropped({**BANK, DESCRIBED: adapters("bank.epoch_share=0.25"), **PLACES, **STEPS, **SHARES}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the grocery photos")
    parser.add_argument("--seeds", default="1,2", type=numbers)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-domain"))
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), help="names of rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/domain_study.jsonl"))
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - VARIANTS.keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    require_lists(arguments.data)
    try:
        base = load(load_recipe(RECIPE).base)
        grocery = Grocery.prepare(arguments.data, arguments.work, scenes_of(base, arguments.data))
        for name in arguments.only:
            for seed in arguments.seeds:
                asked = as_domain_asks(arguments, name)
                job = make_job(asked, grocery, VARIANTS[name].row, seed, base.fingerprint)
                if not is_done(asked, job):
                    append(arguments.out, {**run(asked, grocery, job), "change": name})
                    write_text(arguments.out.with_suffix(".md"), as_table(read_runs(arguments.out)))
    except TrimtabError as error:
        sys.exit(f"error: {error}")
    write_text(arguments.out.with_suffix(".md"), as_table(read_runs(arguments.out)))


def as_domain_asks(arguments: argparse.Namespace, name: str) -> argparse.Namespace:
    """The options of `domain.py` for one row of this study."""
    variant = VARIANTS[name]
    return argparse.Namespace(
        recipe=RECIPE,
        share=variant.share,
        described=name.endswith(DESCRIBED),
        out=arguments.out,
        work=arguments.work,
        set=[],
        set_row=[(variant.row, change) for change in variant.changes],
        validation_only=True,
        no_general=True,
        no_curve=True,
        warm=True,
    )


def as_table(runs: Sequence[Run]) -> str:
    """Rows in the study's order, each the mean over its seeds, and what it gains over its reference with these seeds.

    The reference is the recipe, or what it was when maps were still cropped. Of each row the setting that was run last:
    older recipes are left out.
    """
    found: dict[str, dict[int, Run]] = {}
    for one in of_last_setting(runs, lambda run: run["change"]):
        found.setdefault(one["change"], {})[one["seed"]] = one
    names = [name for name in VARIANTS if name in found]
    before = [name for name in names if name.startswith(f"{CROPPED}: ")]
    tables = [_rows(found, [name for name in names if name not in before], AS_IT_IS)]
    if before:
        tables.append(f"On {CROPPED}:\n\n{_rows(found, [CROPPED, *before], CROPPED)}")
    return "\n".join(tables)


def _rows(found: dict[str, dict[int, Run]], names: Sequence[str], reference: str) -> str:
    known = found.get(reference, {})
    lines = [
        "| change | held-out scenes | validation | mean of both, against the first row | trained, % of base | seeds |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name in (name for name in names if name in found):
        mine = found[name]
        gains = [both(mine[seed]) - both(known[seed]) for seed in sorted(mine.keys() & known.keys())]
        one = next(iter(mine.values()))
        cells = (
            f"{fmean(run['scenes']['fine'] for run in mine.values()):.1f}",
            f"{fmean(run['val']['fine'] for run in mine.values()):.1f}",
            "" if name == reference or not gains else shown(spread(gains), 1, sign=True),
            f"{100 * one['trained_parameters'] / one['base_parameters']:.2f}",
            ", ".join(map(str, sorted(mine))),
        )
        lines.append(f"| {name.removeprefix(f'{CROPPED}: ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def both(run: Run) -> float:
    """Fine top-1 on held-out scenes and on validation, each counted once: they err in different ways."""
    return fmean((run["scenes"]["fine"], run["val"]["fine"]))


if __name__ == "__main__":
    main()
