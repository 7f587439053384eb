"""From results to blocks: what the report of the domain link shows.

Scores travel as in `summaries`, as rows ``{"row": ..., "dataset": ..., "metric": ..., "value": ..., "seed": ...}``, so
a report can be made again from ``results.json``. ``row`` is a key of `METHODS`; ``seed`` is None for what no seed
changes, such as the base. General ability stands under the dataset `GENERAL` (``score``, ``forgetting`` in points,
``forgetting_relative``), cost under `TRAINING` (``parameters``, ``percent_of_base``, ``minutes``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from trimtab.evaluation.blocks import (
    Cell,
    Column,
    LinePanel,
    Lines,
    Series,
    Table,
    TableRow,
    format_value,
)
from trimtab.evaluation.forgetting import GeneralSet
from trimtab.evaluation.summaries import METRIC_NAMES, ScoreRow, score

METHODS = {
    "base": ("Base, zero-shot", "frozen, as it came"),
    "full": ("Continual fine-tuning", "all weights of the base"),
    "lora": ("LoRA", "low-rank updates, by `peft`"),
    "linear_probe": ("Linear probe", "a classifier on frozen features"),
    "adapter": ("Adapter", "every pair equally often"),
    "adapter_hard": ("Adapter, hard sampling", "the domain link"),
}
"""Rows of the table: name and explanation."""

REFERENCE_METHOD, MAIN_METHOD = "base", "adapter_hard"
GENERAL, TRAINING = "general", "training"
_LESS_IS_BETTER = ("forgetting", "parameters", "minutes")

# Grey for the reference, the house's colour for the domain link, the same in every chart.
_COLORS = {"base": 0, "full": 4, "lora": 2, "linear_probe": 3, "adapter": 5, "adapter_hard": 1}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample, None for one value) over `n` seeds."""

    mean: float
    deviation: float | None
    n: int


def with_seed(rows: Iterable[ScoreRow], seed: int | None) -> list[dict[str, Any]]:
    """Rows of `summaries.score_rows` as rows of the domain link."""
    return [{**row, "seed": seed} for row in rows]


def general_rows(
    row: str, found: Mapping[str, Any], sets: Sequence[GeneralSet], *, seed: int | None
) -> list[dict[str, Any]]:
    """Flatten what `forgetting.forgetting` found: a row per set, and score and forgetting over all of them."""
    values: list[tuple[str, str, float]] = [
        (each.name, each.metric, found["sets"][each.name]["after"]) for each in sets
    ]
    values += [(GENERAL, "score", found["after"]), (GENERAL, "forgetting", found["points"])]
    if found["relative"] is not None:
        values.append((GENERAL, "forgetting_relative", found["relative"]))
    return [_row(row, dataset, metric, value, seed) for dataset, metric, value in values]


def training_rows(
    row: str, *, parameters: int, base_parameters: int, minutes: float, seed: int | None
) -> list[dict[str, Any]]:
    """What a method cost: trained parameters, also in percent of the base's, and minutes of training."""
    values = {"parameters": parameters, "percent_of_base": 100 * parameters / base_parameters, "minutes": minutes}
    return [_row(row, TRAINING, metric, value, seed) for metric, value in values.items()]


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and standard deviation; None when there is no value."""
    values = list(values)
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None


def method_table(
    rows: Sequence[ScoreRow],
    scores: Sequence[tuple[str, str, str]],
    *,
    group: str,
    methods: Mapping[str, tuple[str, str]],
    title: str = "",
    note: str = "",
) -> Table:
    """Methods side by side, trained with one seed; the best of the trained methods is marked in each column.

    Args:
        rows: scores.
        scores: dataset, metric and heading of the domain's own scores: ("grocery", "top1", "Fine top-1").
        group: heading above them.
        methods: rows of the table.
        title: heading.
        note: small print below, before the sentence on the seed.
    """
    columns = [(dataset, metric, Column(label, group, meter=100.0)) for dataset, metric, label in scores]
    columns += [
        (GENERAL, "score", Column("Score", "General")),
        (GENERAL, "forgetting", Column("Forgotten, points", "General")),
        (TRAINING, "parameters", Column("Parameters", "Training", digits=0)),
        (TRAINING, "minutes", Column("Minutes", "Training")),
    ]
    body = {key: [Cell(label, note=meaning)] for key, (label, meaning) in methods.items()}
    for dataset, metric, _ in columns:
        pick = min if metric in _LESS_IS_BETTER else max
        found = {key: score(rows, key, dataset, metric) for key in methods}
        trained = [value for key, value in found.items() if key != REFERENCE_METHOD and value is not None]
        best = pick(trained) if len(trained) > 1 else None
        for key, value in found.items():
            first = key != REFERENCE_METHOD and value is not None and value == best
            mark = "best" if first else ""
            if metric != "parameters" or value is None:
                body[key].append(Cell(value, mark))
                continue
            share = score(rows, key, TRAINING, "percent_of_base")
            small = "" if share is None else f"{share:.3g}% of the base"
            # No seed changes it, so the best is so for certain.
            notes = " · ".join(filter(None, (mark, small)))
            body[key].append(Cell(round(value), notes, tone="good" if first else "plain"))
    told = (
        "One seed: nothing is known about the spread, so small differences may be chance. `best` is the highest "
        "of these figures, or the lowest where less is better."
    )
    return Table(
        [Column("Method", numeric=False), *(column for _, _, column in columns)],
        [TableRow(cells, strong=key == MAIN_METHOD) for key, cells in body.items()],
        title=title,
        note=f"{note}\n\n{told}".strip(),
    )


def general_table(
    rows: Sequence[ScoreRow],
    sets: Sequence[tuple[str, str, str]],
    *,
    methods: Mapping[str, tuple[str, str]],
    title: str = "",
) -> Table:
    """Each general set after training, and how far that is from the base.

    Args:
        rows: scores.
        sets: dataset, metric and heading.
        methods: rows of the table.
        title: heading.
    """
    body = []
    for key, (label, _) in methods.items():
        cells: list[Cell | str | int | float | None] = [label]
        for name, metric, _ in sets:
            was, now = (score(rows, each, name, metric) for each in (REFERENCE_METHOD, key))
            change = "" if key == REFERENCE_METHOD or was is None or now is None else _signed(now - was)
            cells.append(Cell(now, change))
        body.append(TableRow(cells, strong=key == MAIN_METHOD))
    columns = [Column("Method", numeric=False)]
    columns += [Column(METRIC_NAMES.get(metric, metric), label) for _, metric, label in sets]
    return Table(columns, body, title=title)


def alpha_lines(
    points: Iterable[Mapping[str, Any]],
    *,
    domain: str,
    title: str = "",
    note: str = "",
) -> Lines:
    """Domain score over general score, a line per method of `METHODS` along `alpha`; mean over seeds.

    Args:
        points: what `forgetting.alpha_curve` gives, each with ``row``, and ``seed`` when there are several.
        domain: name of the vertical axis with its unit.
        title: heading.
        note: small print below.
    """
    together: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for point in points:
        line = together.setdefault(point["row"], {})
        line.setdefault(float(point["alpha"]), []).append((float(point["general"]), float(point["domain"])))
    series = []
    for key in (key for key in METHODS if key in together):
        line = together[key]
        alphas = sorted(line)
        xs, ys = ([fmean(pair[axis] for pair in line[alpha]) for alpha in alphas] for axis in (0, 1))
        labels = ["base" if alpha == 0 else f"{alpha:g}" for alpha in alphas]
        series.append(Series(METHODS[key][0], xs, ys, labels, _COLORS.get(key)))
    panel = LinePanel(series, x_label="general score, %", y_label=domain, digits=1, tall=True)
    told = (
        "Up is better in the domain, right is better elsewhere: a line that rises without going left learns and does "
        "not forget.\n\nNumbers at the points are `alpha`: 0 is the base, 1 the trained model."
    )
    return Lines([panel], title=title, note=f"{told}\n\n{note}".strip())


def training_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    terms: Mapping[str, str],
    metrics: Mapping[str, str],
    methods: Mapping[str, tuple[str, str]] = METHODS,
    kept: tuple[float, str] | None = None,
    title: str = "Training",
    note: str = "",
) -> Lines:
    """Loss terms over steps and validation metrics over epochs, a panel each, a line per method that has them.

    A loss over hard pairs does not compare with one over all pairs, so the note says so where both are drawn.

    Args:
        histories: records of the training loop, by method.
        terms: keys of training records, and headings.
        metrics: keys of validation records, and headings.
        methods: names of the lines; other rows are left out.
        kept: step of the weights that were kept, and its label; for one method.
        title: heading.
        note: small print below.
    """
    panels = []
    for kind, wanted in (("train", terms), ("validation", metrics)):
        for name, label in wanted.items():
            series = []
            for key in (key for key in methods if key in histories):
                records = [record for record in histories[key] if record["kind"] == kind and name in record]
                if records:
                    steps, values = [record["step"] for record in records], [record[name] for record in records]
                    series.append(Series(methods[key][0], steps, values, color=_COLORS.get(key)))
            longest = max((len(line.xs) for line in series), default=0)
            smooth = 15 if kind == "train" and longest > 45 else 1
            mark = kept if kind == "validation" and len(series) == 1 else None
            panels.append(LinePanel(series, title=label, x_label="step", smooth=smooth, mark=mark))
    if MAIN_METHOD in histories and len(histories) > 1:
        note = f"{note} With hard sampling the loss is taken over harder pairs: compare validation, not loss.".strip()
    return Lines(panels, title=title, note=note)


def _row(row: str, dataset: str, metric: str, value: float, seed: int | None) -> dict[str, Any]:
    return {"row": row, "dataset": dataset, "metric": metric, "value": value, "seed": seed}


def _signed(value: float) -> str:
    text = format_value(abs(value), 1)
    return text if text == "0.0" else f"{'+' if value > 0 else '−'}{text}"
