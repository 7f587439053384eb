"""From results to blocks: what the report of the domain link shows.

Scores travel as in `summaries`, as rows ``{"row": ..., "dataset": ..., "metric": ..., "value": ..., "seed": ...}``, so
a report can be made again from ``results.json``. ``row`` is a key of `METHODS`; ``seed`` is None for what no seed
changes, such as the base. General ability stands under the dataset `GENERAL` (``score``, ``forgetting`` in points,
``forgetting_relative``), cost under `TRAINING` (``parameters``, ``percent_of_base``, ``minutes``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

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
from trimtab.evaluation.summaries import METRIC_NAMES, ScoreRow

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

# Grey for the reference, the house's colour for the domain link, the same in every chart.
_COLORS = {"base": 0, "full": 4, "lora": 2, "linear_probe": 3, "adapter": 5, "adapter_hard": 1}


@dataclass(frozen=True)
class MethodColumn:
    """A figure of every method.

    Attributes:
        dataset: where it was measured, as in the rows.
        metric: as in the rows.
        label: heading.
        group: heading above it.
        better: which end is marked as best; "neither" marks none.
        digits: decimals; 0 shows whole numbers.
        meter: end of the scale of a thin bar; 0 for none.
        exact: no seed changes it, so it has no spread.
        small: metric of the same dataset for the small print, and how to put it, such as "{:.1f}% of the base".
    """

    dataset: str
    metric: str
    label: str
    group: str = ""
    better: Literal["high", "low", "neither"] = "high"
    digits: int = 1
    meter: float = 0.0
    exact: bool = False
    small: tuple[str, str] | None = None


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample, None for one value) over `n` seeds."""

    mean: float
    deviation: float | None
    n: int


def domain_columns(scores: Sequence[tuple[str, str, str]], *, group: str) -> list[MethodColumn]:
    """The columns of the domain link's table.

    Args:
        scores: dataset, metric and heading of the domain's own scores: ("grocery", "top1", "Fine top-1").
        group: heading above them.
    """
    return [
        *(MethodColumn(dataset, metric, label, group, meter=100.0) for dataset, metric, label in scores),
        MethodColumn(GENERAL, "score", "Score", "General"),
        MethodColumn(GENERAL, "forgetting", "Forgotten, points", "General", "low"),
        MethodColumn(
            *(TRAINING, "parameters", "Parameters", "Training", "low"),
            digits=0,
            exact=True,
            small=("percent_of_base", "{:.3g}% of the base"),
        ),
        MethodColumn(TRAINING, "minutes", "Minutes", "Training", "low"),
    ]


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


def by_seed(rows: Iterable[ScoreRow], row: str, dataset: str, metric: str) -> dict[int | None, float]:
    """The finite values of one cell.

    Raises:
        ValueError: when one seed has two values.
    """
    found: dict[int | None, float] = {}
    for entry in rows:
        if (entry["row"], entry["dataset"], entry["metric"]) == (row, dataset, metric):
            if (seed := entry.get("seed")) in found:
                raise ValueError(f"{row}, {dataset}, {metric} has two values for seed {seed}")
            found[seed] = float(entry["value"])
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and standard deviation; None when there is no value."""
    values = list(values)
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None


def method_table(
    rows: Iterable[ScoreRow],
    columns: Sequence[MethodColumn],
    *,
    methods: Mapping[str, tuple[str, str]] = METHODS,
    missing: Mapping[str, str] | None = None,
    title: str = "",
    note: str = "",
) -> Table:
    """Methods side by side: mean over seeds, spread in small print, the best of the trained methods marked.

    Methods whose difference from the best is not larger than its spread, the root of the two squared deviations
    added up, are marked as equal to it ("≈ best"). Nothing is marked where one method alone has a figure.

    Args:
        rows: scores.
        columns: such as `domain_columns` makes.
        methods: rows of the table; others are left out.
        missing: why a method has no figures ("lora": "peft is not installed").
        title: heading.
        note: small print below, before the sentence on seeds.
    """
    rows = list(rows)
    cells = {key: [spread(by_seed(rows, key, c.dataset, c.metric).values()) for c in columns] for key in methods}
    trained = [key for key in methods if key != REFERENCE_METHOD]
    seeded = [at for at, column in enumerate(columns) if not column.exact]
    most = max((found.n for key in trained for at in seeded if (found := cells[key][at])), default=1)
    marks = [
        _marks({key: found for key in trained if (found := cells[key][at])}, column)
        for at, column in enumerate(columns)
    ]
    body = []
    for key, (label, meaning) in methods.items():
        head = Cell(label, note=meaning)
        if all(found is None for found in cells[key]):
            reason = (missing or {}).get(key, "not measured in this run")
            body.append(TableRow([head], empty=f"not available here: {reason}"))
            continue
        shown: list[Cell | str | int | float | None] = [head]
        for at, column in enumerate(columns):
            expected = 0 if column.exact or key == REFERENCE_METHOD else most
            small = ""
            if column.small is not None:
                other = spread(by_seed(rows, key, column.dataset, column.small[0]).values())
                small = column.small[1].format(other.mean) if other else ""
            shown.append(_spread_cell(cells[key][at], column, expected, marks[at].get(key, ""), small))
        body.append(TableRow(shown, strong=key == MAIN_METHOD))
    heads = [Column("Method", numeric=False)]
    heads += [Column(column.label, column.group, column.digits, column.meter) for column in columns]
    return Table(heads, body, title=title, note=f"{note}\n\n{_about_seeds(most)}".strip())


def method_comparison(
    rows: Iterable[ScoreRow],
    dataset: str,
    metric: str,
    label: str,
    *,
    methods: Mapping[str, tuple[str, str]] = METHODS,
    title: str = "",
    note: str = "",
) -> Table:
    """The domain link against each other method: points ahead, seed by seed, and shares of the others' cost.

    Seeds are paired: what varies with the seed alone (the order of the data) falls out of the difference.
    """
    rows = list(rows)
    own = by_seed(rows, MAIN_METHOD, dataset, metric)
    body = []
    for key, (name, _) in methods.items():
        others = by_seed(rows, key, dataset, metric)
        if key == MAIN_METHOD or not others:
            continue
        if list(others) == [None]:  # no seed changes it
            others = dict.fromkeys(own, others[None])
        ahead = [own[seed] - others[seed] for seed in own if seed in others]
        cells: list[Cell | str | int | float | None] = [name, _ahead_cell(ahead)]
        for group, measured in ((GENERAL, "forgetting"), (TRAINING, "minutes"), (TRAINING, "parameters")):
            mine = spread(by_seed(rows, MAIN_METHOD, group, measured).values())
            theirs = spread(by_seed(rows, key, group, measured).values())
            known = mine is not None and theirs is not None and key != REFERENCE_METHOD and theirs.mean > 0
            cells.append(Cell(round(100 * mine.mean / theirs.mean) if known and mine and theirs else None))
        body.append(TableRow(cells))
    columns = [Column("Against", numeric=False), Column(f"{label}, points ahead")]
    columns += [Column(name, "% of the other's") for name in ("forgetting", "minutes", "parameters")]
    told = "Differences are taken seed by seed; 100 is as much as the other method."
    return Table(columns, body, title=title, note=f"{note} {told}".strip())


def general_table(
    rows: Iterable[ScoreRow],
    sets: Sequence[tuple[str, str, str]],
    *,
    methods: Mapping[str, tuple[str, str]] = METHODS,
    title: str = "",
    note: str = "",
) -> Table:
    """Each general set after training, and how far that is from the base.

    Args:
        rows: scores.
        sets: dataset, metric and heading.
        methods: rows of the table; those without figures are left out.
        title: heading.
        note: small print below.
    """
    rows = list(rows)
    before = [spread(by_seed(rows, REFERENCE_METHOD, name, metric).values()) for name, metric, _ in sets]
    body = []
    for key, (label, _) in methods.items():
        found = [spread(by_seed(rows, key, name, metric).values()) for name, metric, _ in sets]
        if all(each is None for each in found):
            continue
        cells: list[Cell | str | int | float | None] = [label]
        for was, now in zip(before, found):
            change = _signed(now.mean - was.mean) if was and now and key != REFERENCE_METHOD else ""
            if change and now and now.deviation is not None:
                change += f" ± {now.deviation:.1f}"
            cells.append(Cell(now.mean if now else None, change))
        body.append(TableRow(cells, strong=key == MAIN_METHOD))
    columns = [Column("Method", numeric=False)]
    columns += [Column(METRIC_NAMES.get(metric, metric), label) for _, metric, label in sets]
    return Table(columns, body, title=title, note=note)


def alpha_lines(
    points: Iterable[Mapping[str, Any]],
    *,
    domain: str,
    general: str = "general score, %",
    methods: Mapping[str, tuple[str, str]] = METHODS,
    title: str = "",
    note: str = "",
) -> Lines:
    """Domain score over general score, a line per method along `alpha`; mean over seeds.

    Args:
        points: what `forgetting.alpha_curve` gives, each with ``row``, and ``seed`` when there are several.
        domain: name of the vertical axis with its unit.
        general: name of the horizontal axis with its unit.
        methods: names of the lines; other rows are left out.
        title: heading.
        note: small print below.
    """
    together: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for point in points:
        line = together.setdefault(point["row"], {})
        line.setdefault(float(point["alpha"]), []).append((float(point["general"]), float(point["domain"])))
    series = []
    for key in (key for key in methods if key in together):
        line = together[key]
        alphas = sorted(line)
        xs, ys = ([fmean(pair[axis] for pair in line[alpha]) for alpha in alphas] for axis in (0, 1))
        labels = ["base" if alpha == 0 else f"{alpha:g}" for alpha in alphas]
        series.append(Series(methods[key][0], xs, ys, labels, _COLORS.get(key)))
    panel = LinePanel(series, x_label=general, y_label=domain, digits=1, tall=True)
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


def _marks(found: Mapping[str, Spread], column: MethodColumn) -> dict[str, str]:
    if column.better == "neither" or len(found) < 2:
        return {}
    pick = max if column.better == "high" else min
    best = pick(found.values(), key=lambda each: each.mean)
    marks = {}
    for key, each in found.items():
        if each.mean == best.mean:
            marks[key] = "best"
        elif None not in (each.deviation, best.deviation):
            apart = math.hypot(each.deviation or 0.0, best.deviation or 0.0)
            if abs(each.mean - best.mean) <= apart:
                marks[key] = "≈ best"
    return marks


def _spread_cell(found: Spread | None, column: MethodColumn, expected: int, mark: str, small: str) -> Cell:
    """`expected` is how many seeds a figure should have; 0 when seeds do not matter."""
    if found is None:
        return Cell(None)
    parts = [f"± {found.deviation:.{column.digits}f}"] if expected and found.deviation is not None else []
    if found.n < expected:
        parts.append("one seed" if found.n == 1 else f"{found.n} seeds")
    parts += [text for text in (mark, small) if text]
    certain = mark == "best" and (not expected or found.n > 1)
    value = found.mean if column.digits else round(found.mean)
    return Cell(value, " · ".join(parts), tone="good" if certain else "plain")


def _ahead_cell(ahead: Sequence[float]) -> Cell:
    if (found := spread(ahead)) is None:
        return Cell(None, "no seed in common")
    if found.deviation is None:
        return Cell(_signed(found.mean), "one seed")
    won = sum(value > 0 for value in ahead)
    return Cell(_signed(found.mean), f"± {found.deviation:.1f} · ahead in {won} of {found.n} seeds")


def _signed(value: float) -> str:
    text = format_value(abs(value), 1)
    return text if text == "0.0" else f"{'+' if value > 0 else '−'}{text}"


def _about_seeds(most: int) -> str:
    if most == 1:
        return (
            "One seed: nothing is known about the spread, so small differences may be chance. `best` is the highest "
            "of these figures, or the lowest where less is better."
        )
    return (
        f"Mean ± standard deviation over {most} seeds. `best` is the best mean of the trained methods; `≈ best` "
        "differs from it by no more than the spread of the difference."
    )
