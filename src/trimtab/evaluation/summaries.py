"""From results to blocks: the tables and charts that every link's report shares.

Scores travel as rows ``{"row": ..., "dataset": ..., "metric": ..., "value": ...}``, which is also how they stand
in ``results.json``, so a report can be made again from the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab.evaluation.blocks import (
    BarPanel,
    Bars,
    Block,
    Cell,
    Code,
    Column,
    Details,
    Facts,
    Group,
    Table,
    TableRow,
    Text,
    Value,
)
from trimtab.evaluation.classification import ClassificationResult
from trimtab.evaluation.retrieval import DEFAULT_KS, RetrievalResult

ScoreRow = Mapping[str, Any]

REFERENCE_ROW = "english_base"
PRIMARY_METRICS = ("mR", "top1")
# Below this share of the base's score, adapted English is marked.
ENGLISH_KEPT = 98.0
METRIC_NAMES = {"mR": "mR", "top1": "top-1", "top5": "top-5"}
# Reference grey, the adapted row in the colour of the house.
_ROW_COLORS = {
    "english_base": 0,
    "target_raw": 4,
    "translation": 3,
    "adapted_target": 1,
    "adapted_english": 2,
}


def score_rows(row: str, dataset: str, result: RetrievalResult | ClassificationResult) -> list[dict[str, str | float]]:
    """Flatten a result: metrics mR, "i2t R@1" ... "t2i R@10", or top1 and top5."""
    if isinstance(result, RetrievalResult):
        values = {"mR": result.mR}
        for direction, recalls in (("i2t", result.recall.i2t), ("t2i", result.recall.t2i)):
            values |= {f"{direction} {name}": value for name, value in recalls.items()}
    else:
        values = {"top1": result.top1, "top5": result.top5}
    return [{"row": row, "dataset": dataset, "metric": name, "value": value} for name, value in values.items()]


def score(rows: Iterable[ScoreRow], row: str, dataset: str, metric: str) -> float | None:
    """The value of one cell; None when it was not measured."""
    for entry in rows:
        if (entry["row"], entry["dataset"], entry["metric"]) == (row, dataset, metric):
            return float(entry["value"])
    return None


def ratio_to_english(rows: Iterable[ScoreRow], row: str, dataset: str, metric: str) -> float | None:
    """A row's value in percent of the English base's; None when either is missing or the base has 0."""
    rows = list(rows)
    value, reference = score(rows, row, dataset, metric), score(rows, REFERENCE_ROW, dataset, metric)
    return 100 * value / reference if value is not None and reference else None


def five_row_labels(language: str) -> dict[str, tuple[str, str]]:
    """Name and explanation of each row, for a target language by its English name."""
    return {
        "english_base": ("English, base model", "what the frozen model can do"),
        "target_raw": (f"{language}, base model", f"{language} straight into its English tower"),
        "translation": ("Translated, base model", f"{language} into English first"),
        "adapted_target": (f"{language}, adapted", "the language link"),
        "adapted_english": ("English, adapted", "what English keeps"),
    }


def five_row_table(
    rows: Iterable[ScoreRow],
    *,
    language: str,
    missing: Mapping[str, str] | None = None,
    metrics: Sequence[str] = PRIMARY_METRICS,
    title: str = "",
    note: str = "",
) -> Table:
    """The table of the language link: rows x (dataset, metric), each with its ratio to English.

    Args:
        rows: scores.
        language: English name of the target language.
        missing: why a row has no figures ("translation": "no translator is installed").
        metrics: those that become columns, for the datasets that have them.
        title: heading.
        note: small print below.
    """
    rows = list(rows)
    keys = list(dict.fromkeys((entry["dataset"], entry["metric"]) for entry in rows))
    keys = sorted((key for key in keys if key[1] in metrics), key=lambda key: metrics.index(key[1]))
    columns = [Column("Text", numeric=False)]
    columns += [
        Column(METRIC_NAMES.get(metric, str(metric)), group=str(dataset), meter=100.0) for dataset, metric in keys
    ]
    body = []
    for name, (label, meaning) in five_row_labels(language).items():
        head = Cell(label, note=meaning)
        values = [score(rows, name, *key) for key in keys]
        if all(value is None for value in values):
            reason = (missing or {}).get(name, "not measured in this run")
            body.append(TableRow([head], empty=f"not available here: {reason}"))
            continue
        cells: list[Cell | str | int | float | None] = [head]
        for key, value in zip(keys, values):
            ratio = ratio_to_english(rows, name, *key)
            small = "" if ratio is None or name == REFERENCE_ROW else f"{ratio:.0f}% of English"
            lost = name == "adapted_english" and ratio is not None and ratio < ENGLISH_KEPT
            cells.append(Cell(value, small, tone="caution" if lost else "plain"))
        body.append(TableRow(cells, strong=name == "adapted_target"))
    return Table(columns, body, title=title, note=note)


def recall_bars(rows: Iterable[ScoreRow], dataset: str, *, language: str, title: str = "") -> Bars:
    """R@1, R@5 and R@10 of every row that has them, a panel per direction."""
    rows = list(rows)
    labels = five_row_labels(language)
    present = [name for name in labels if score(rows, name, dataset, "i2t R@1") is not None]
    ks = [f"R@{k}" for k in DEFAULT_KS]
    panels = [
        BarPanel(ks, [[score(rows, name, dataset, f"{way} {k}") for k in ks] for name in present], title=heading)
        for way, heading in (("t2i", "Text finds image"), ("i2t", "Image finds text"))
    ]
    return Bars(
        [labels[name][0] for name in present],
        panels,
        title=title,
        colors=[_ROW_COLORS[name] for name in present],
        maximum=100.0,
        unit="%",
    )


def class_errors(
    result: Mapping[str, Any],
    confusions: Sequence[Mapping[str, Any]] | None = None,
    *,
    limit: int = 20,
    title: str = "Hardest classes",
) -> Table:
    """The classes with the lowest top-1 and what each was taken for most; from a classification's JSON.

    Args:
        result: that JSON.
        confusions: all of them, most frequent first; those of the JSON, the 50 most frequent, may lack a class's.
        limit: classes shown.
        title: heading.
    """
    taken: dict[str, tuple[str, int]] = {}
    for cell in result["confusions"] if confusions is None else confusions:
        taken.setdefault(cell["class"], (cell["taken_for"], cell["count"]))
    worst = sorted(result["per_class"], key=lambda item: (item["top1"], -item["n"], item["class"]))
    rows = []
    for item in (item for item in worst[:limit] if item["top1"] < 100):
        name, count = taken.get(item["class"], ("", 0))
        often = {0: "", 1: "once"}.get(count, f"{count} times")
        rows.append(TableRow([item["class"], item["n"], item["top1"], Cell(name, often)]))
    columns = [
        Column("Class", numeric=False),
        Column("Pictures"),
        Column("Top-1", meter=100.0),
        Column("Most often taken for", numeric=False),
    ]
    total = len(result["per_class"])
    note = f"{len(rows)} of {total} classes; mean over classes {result['mean_per_class']:.1f}%."
    return Table(columns, rows, title=title, note=note)


def skipped_images(skipped: Sequence[Mapping[str, str]], *, limit: int = 200) -> Block | None:
    """Pictures that were left out, behind a fold; None when there are none. Entries as in the JSON."""
    if not skipped:
        return None
    rows = [TableRow([item["source"], item["reason"]]) for item in skipped[:limit]]
    more = f"and {len(skipped) - limit} more; the JSON of the evaluation has all" if len(skipped) > limit else ""
    table = Table([Column("Picture", numeric=False), Column("Why", numeric=False)], rows, note=more)
    return Details(f"Pictures left out: {len(skipped)}", [table])


def reproducibility(
    facts: Mapping[str, Value] | Sequence[tuple[str, Value]],
    *,
    command: str = "",
    recipe: str = "",
    title: str = "Make it again",
) -> Group:
    """What is needed to repeat the run: command, seed, versions, fingerprints, durations, the resolved recipe."""
    pairs = list(facts.items()) if isinstance(facts, Mapping) else list(facts)
    blocks: list[Block] = [Code(command, language="sh")] if command else []
    blocks.append(Facts(pairs))
    if recipe:
        blocks.append(Details("Recipe as resolved", [Code(recipe, language="yaml")]))
    return Group(title, blocks)


def notes(warnings: Sequence[str], *, title: str = "Please note") -> Text | None:
    """Warnings of a run as one note; None when there are none."""
    if not warnings:
        return None
    lines = [" ".join(text.split()) for text in warnings]
    body = lines[0] if len(lines) == 1 else "\n".join(f"- {line}" for line in lines)
    return Text(body, title=title, tone="caution")
