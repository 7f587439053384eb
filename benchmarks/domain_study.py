"""Choices of `recipes/domain-grocery.yaml`, one change at a time, on validation pictures of other scenes.

    python benchmarks/domain_study.py --data path/to/grocery

Every row trains the recipe with one change, for 6 of its 10 epochs, and is judged by the share of validation pictures
that get their own fine class, and by the mean recall of all captions, which varies less from run to run; the test split
is never read. One seed of a short run sorts out what is far off and no more: docs/domain.md has what became of the best
rows in all epochs. Rows that stand in the output file already, with the same recipe, are not repeated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domain import RECIPE, Grocery, append, is_done, make_job, read_runs, run
from domain_tables import Run

from trimtab.adapters.adapted import load
from trimtab.config import load_recipe
from trimtab.errors import TrimtabError
from trimtab.files import write_text

EPOCHS = 6
SEED = 1
AS_IT_IS = "recipe as it is"
DESCRIBED = "captions: names and descriptions"


TEXT = ", {tower: text, kind: bottleneck, first: -2, width: 64}"


def conv(first: int, width: int = 128, more: str = "") -> str:
    """Adapters as the recipe has them, elsewhere, of another width or with more of them."""
    groups = (
        f"{{tower: image, kind: conv, first: {first}, last: -1, width: {width}}}, "
        "{tower: image, kind: bottleneck, width: 64}"
    )
    return f"adapters=[{groups}{more}]"


# By name: the row of `domain.ROWS` that is trained, and the changes to it.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    AS_IT_IS: ("adapter_hard", []),
    "no bank: pairs alike, no hard negatives": ("adapter", []),
    "hard negatives alone: pairs alike": ("adapter_negatives", []),
    "bank: gamma 2": ("adapter_hard", ["bank.gamma=2"]),
    "bank: difficulty by rank": ("adapter_hard", ["bank.difficulty=rank"]),
    "bank: learnability": ("adapter_hard", ["bank.difficulty=learnability"]),
    "bank: importance correction 0.5": ("adapter_hard", ["bank.importance=0.5"]),
    DESCRIBED: ("adapter_hard", ["bank.epoch_share=0.25"]),  # twice the pairs, so as many are drawn
    "adapters from block 3": ("adapter_hard", [conv(3)]),
    "adapters from block 5": ("adapter_hard", [conv(5)]),
    "adapters from block 14": ("adapter_hard", [conv(14)]),
    "adapters from block 11": ("adapter_hard", [conv(11)]),
    # A gate wants texts to stay where they are.
    "no gate": ("adapter_hard", ["gate=none"]),
    "adapters in the text tower too, no gate": ("adapter_hard", [conv(8, more=TEXT), "gate=none"]),
    "adapters half as wide": ("adapter_hard", [conv(8, 64)]),
    "adapters twice as wide": ("adapter_hard", [conv(8, 256)]),
    "logit_scale 20": ("adapter_hard", ["objective.logit_scale=20"]),
    "no label smoothing": ("adapter_hard", ["objective.label_smoothing=0"]),
    "label smoothing 0.1": ("adapter_hard", ["objective.label_smoothing=0.1"]),
    "label smoothing 0.3": ("adapter_hard", ["objective.label_smoothing=0.3"]),
    "weights at the end, no mean of those on the way": ("adapter_hard", ["training.bell=null"]),
    "AdamW, rate 5e-3": ("adapter_hard", ["training.optimizer=adamw", "training.learning_rate=5e-3"]),
    "rate 5e-3": ("adapter_hard", ["training.learning_rate=5e-3"]),
    "rate 2e-2": ("adapter_hard", ["training.learning_rate=2e-2"]),
    "batches of 16, rate 7e-3": ("adapter_hard", ["training.batch_size=16", "training.learning_rate=7e-3"]),
    "batches of 64, rate 1.4e-2": ("adapter_hard", ["training.batch_size=64", "training.learning_rate=1.4e-2"]),
    "cached maps as they are": ("adapter_hard", ["data.map_augmentation={}"]),
    "cached maps cropped further, and erased": (
        "adapter_hard",
        ["data.map_augmentation={crop_min: 0.4, flip: true, erase: 0.5}"],
    ),
    "one augmented view": ("adapter_hard", ["data.views=1"]),
    "two augmented views": ("adapter_hard", ["data.views=2"]),
    "four augmented views": ("adapter_hard", ["data.views=4"]),
    "LoRA by peft, pairs alike": ("lora", []),
    "continual fine-tuning, pairs alike": ("full", []),
    "continual fine-tuning by Muon, pairs alike": ("full", ["training.optimizer=muon"]),
    "continual fine-tuning, mean of the weights on the way": ("full", ["training.bell=[0.8, 0.2]"]),
    "continual fine-tuning with label smoothing": ("full", ["objective.label_smoothing=0.2"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the grocery photos")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-domain"))
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), help="names of rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/domain_study.jsonl"))
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - VARIANTS.keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    grocery = Grocery.prepare(arguments.data, arguments.work)
    fingerprint = load(load_recipe(RECIPE).base).fingerprint
    try:
        for name in arguments.only:
            row, changes = VARIANTS[name]
            asked = as_domain_asks(arguments, row, changes, described=name == DESCRIBED)
            job = make_job(asked, grocery, row, SEED, fingerprint)
            if not is_done(asked, job):
                append(arguments.out, {**run(asked, grocery, job), "change": name})
                write_text(arguments.out.with_suffix(".md"), as_table(read_runs(arguments.out)))
    except TrimtabError as error:
        sys.exit(f"error: {error}")
    write_text(arguments.out.with_suffix(".md"), as_table(read_runs(arguments.out)))


def as_domain_asks(
    arguments: argparse.Namespace, row: str, changes: Sequence[str], *, described: bool = False
) -> argparse.Namespace:
    """The options of `domain.py` for one row of this study."""
    wanted = [f"training.epochs={EPOCHS}", *changes]
    return argparse.Namespace(
        recipe=RECIPE,
        share=1.0,
        described=described,
        out=arguments.out,
        work=arguments.work,
        set=[],
        set_row=[(row, change) for change in wanted],
        validation_only=True,
        no_general=True,
        no_curve=True,
        warm=True,
    )


def as_table(runs: Sequence[Run]) -> str:
    """Rows in the study's order, the recipe's first."""
    found = {run["change"]: run for run in runs}
    known = found.get(AS_IT_IS)
    lines = [
        "| change | fine top-1, validation | against the recipe | coarse | mR | trained, % of base "
        "| training, minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in (name for name in VARIANTS if name in found):
        run = found[name]
        fine = run["val"]["fine"]
        gain = "" if known is None or name == AS_IT_IS else f"{fine - known['val']['fine']:+.1f}"
        trained = 100 * run["trained_parameters"] / run["base_parameters"]
        cells = (
            f"{fine:.1f}",
            gain,
            f"{run['val']['coarse']:.1f}",
            f"{run['validation_recall']['mR']:.1f}",
            f"{trained:.2f}",
            f"{run['seconds']['training'] / 60:.1f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
