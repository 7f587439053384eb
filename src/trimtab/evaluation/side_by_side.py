"""Several runs on one page: what each came to, how it got there, and what differs between their recipes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.evaluation.blocks import (
    PALETTE_SIZE,
    BarPanel,
    Bars,
    Block,
    Cell,
    Code,
    Column,
    Details,
    Facts,
    Group,
    LinePanel,
    Lines,
    Series,
    Table,
    TableRow,
    Text,
    Tile,
    Value,
)
from trimtab.evaluation.report import Report

# Figures that a reader knows what to do with, the main one of a link first; all are percent.
FIGURES = {
    "match": "Translation match",
    "top1": "Top-1",
    "mR": "mR",
    "mean_per_class": "Mean over classes",
    "top5": "Top-5",
    "english_match": "English match",
}
_TERMS = ("loss", "total", "mse", "infonce", "cosine", "gram", "i2t", "t2i", "cross_entropy")
_SHOWN_TILES = 5
_LONG = 60
_SMOOTHED = 40  # points of a line from which on its mean is drawn too


@dataclass(frozen=True)
class Score:
    """A figure on a test set, in percent.

    Attributes:
        row: which model or text it is of, within its run.
    """

    dataset: str
    row: str
    metric: str
    value: float


@dataclass(frozen=True)
class RunResult:
    """What is known of one run.

    Attributes:
        name: short, and different from the others'.
        kind: "language link", "domain link", "evaluation", "few-shot" ...
        figures: on validation data, by the keys of `FIGURES`.
        scores: on test data.
        main_row: the row of `scores` that stands for the run; the first by default.
        history: records of training, as `training.loop` keeps them.
        recipe: as resolved.
        data_digest: of the training data; runs with the same one learnt from the same.
        facts: whatever else is worth knowing.
        test_set: of an evaluation, what tells its test set from others of the same name.
        templates: of an evaluation, what class names stood in.
    """

    name: str
    kind: str
    base: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    scores: Sequence[Score] = ()
    main_row: str = ""
    history: Sequence[Mapping[str, Any]] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    data_digest: str = ""
    facts: Sequence[tuple[str, Value]] = ()
    test_set: tuple[str, ...] = ()
    templates: str = ""

    @property
    def headline(self) -> tuple[str, float, str] | None:
        """The figure that stands for the run: its name, its value, and what it was measured on."""
        main = [score for score in self.scores if score.row == self.main_row] or self.scores
        for score in main:
            if score.metric in FIGURES:
                return FIGURES[score.metric], score.value, f"{score.row}, on {score.dataset}"
        for key, label in FIGURES.items():
            if key in self.figures:
                return label, self.figures[key], "on validation data"
        return None


def side_by_side(runs: Sequence[RunResult], unreadable: Sequence[tuple[str, str]] = (), *, footer: str = "") -> Report:
    """The whole page.

    Args:
        runs: at least one.
        unreadable: paths that are no runs, and why.
    """
    blocks: list[Block | None] = [
        _unreadable(unreadable),
        _figures(runs),
        _tests(runs),
        _test_bars(runs),
        _curves(runs),
        _differences(runs),
        _each(runs),
    ]
    count = f"{len(runs)} runs side by side" if len(runs) > 1 else f"One run: {runs[0].name}"
    return Report(
        count,
        verdict(runs),
        _tiles(runs),
        [block for block in blocks if block is not None],
        context="trimtab report",
        footer=footer,
    )


def verdict(runs: Sequence[RunResult]) -> str:
    """One sentence: which run is ahead, where that can be said at all."""
    heads = [(run, run.headline) for run in runs]
    known = [(run, head) for run, head in heads if head is not None]
    if not known:
        return "None of these runs wrote down a figure."
    if len(runs) == 1:
        _, (label, value, where) = known[0]
        return f"{label} {value:.1f}%, {where}."
    labels = {(head[0], head[2].rpartition(", on ")[2]) for _, head in known}
    digests = {run.data_digest for run, _ in known}
    best, head = max(known, key=lambda each: each[1][1])
    if len(labels) > 1 or len(known) < len(runs):
        return "The main figures of these runs are of different kinds, so that no run can be called the best."
    figure = f"{head[0][0].lower() + head[0][1:]}, {head[1]:.1f}%"
    level = [run.name for run, (_, value, _) in known if f"{value:.1f}" == f"{head[1]:.1f}"]
    told = f"`{best.name}` has the highest {figure}"
    if len(level) > 1:  # nobody wins a tie
        told = f"{', '.join(f'`{name}`' for name in level[:-1])} and `{level[-1]}` are level at the highest {figure}"
    if head[2] == "on validation data" and len(digests - {""}) != 1:
        return f"{told}, but the runs learnt from different data and were validated on their own parts of it."
    return f"{told}, on {head[2].rpartition(', on ')[2].removeprefix('on ')}."


def differences(runs: Sequence[RunResult]) -> dict[str, list[Any]]:
    """Dotted keys of the recipes whose values differ, with each run's value; None where a run has no such key."""
    flat = [dict(flatten(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def flatten(mapping: Mapping[str, Any], start: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted keys and values; lists are values."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value


# Blocks


def _tiles(runs: Sequence[RunResult]) -> list[Tile]:
    tiles = []
    for run in runs[:_SHOWN_TILES]:
        head = run.headline
        label, value, where = head or ("", None, "no figure")
        note = f"{label}, {where}" if label else where
        tiles.append(Tile(run.name, value, "%" if head else "", note))
    return tiles


def _unreadable(paths: Sequence[tuple[str, str]]) -> Block | None:
    if not paths:
        return None
    lines = "\n".join(f"- {path}: {' '.join(reason.split())}" for path, reason in paths)
    what = "This is not on the page" if len(paths) == 1 else f"These {len(paths)} are not on the page"
    return Text(lines, title=f"{what}, because it could not be read", tone="caution")


def _figures(runs: Sequence[RunResult]) -> Block | None:
    keys = [key for key in FIGURES if any(key in run.figures for run in runs)]
    columns = [Column("Run", numeric=False), Column("Kind", numeric=False), Column("Base", numeric=False)]
    columns += [Column(FIGURES[key], group="On validation data", meter=100.0) for key in keys]
    rows = [TableRow([run.name, run.kind, run.base or None, *(run.figures.get(key) for key in keys)]) for run in runs]
    digests = {run.data_digest for run in runs if run.figures}
    note = "Percent, of one seed each: small differences may be chance. What a run is worth, test sets tell."
    if len(digests) > 1:
        note += (
            " The runs learnt from different data: each is validated on its own, and small differences mean nothing."
        )
    return Table(columns, rows, title="The runs", note=note if keys else "")


def _tests(runs: Sequence[RunResult]) -> Block | None:
    keys = list(dict.fromkeys((score.dataset, score.metric) for run in runs for score in run.scores))
    keys = [key for key in keys if key[1] in FIGURES]
    if not keys:
        return None
    columns = [Column("Run", numeric=False), Column("Of", numeric=False)]
    columns += [Column(FIGURES[metric], group=dataset, meter=100.0) for dataset, metric in keys]
    best = {key: _best(runs, key) for key in keys}
    marked = any(value is not None for value in best.values())
    note = "Percent. Of figures that several runs have, the highest is marked." if marked else "Percent."
    rows = []
    for run in runs:
        for row in dict.fromkeys(score.row for score in run.scores):
            found = {(score.dataset, score.metric): score.value for score in run.scores if score.row == row}
            if not any(key in found for key in keys):
                continue
            cells = [_marked(found.get(key), best[key]) for key in keys]
            rows.append(TableRow([run.name, row, *cells]))
    return Table(
        columns,
        rows,
        title="On test sets",
        note=note,
    )


def _best(runs: Sequence[RunResult], key: tuple[str, str]) -> float | None:
    """The highest figure, where several runs have one."""
    values = [[score.value for score in run.scores if (score.dataset, score.metric) == key] for run in runs]
    with_any = [found for found in values if found]
    return max(map(max, with_any)) if len(with_any) > 1 else None


def _marked(value: float | None, best: float | None) -> Cell:
    # As shown: of two runs that are level to all decimals neither is ahead.
    level = value is not None and best is not None and f"{value:.1f}" == f"{best:.1f}"
    return Cell(value, tone="good" if level else "plain")


def _test_bars(runs: Sequence[RunResult]) -> Block | None:
    """The main figure of each dataset that several runs were measured on."""
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for run in runs:
        for score in run.scores:
            if score.metric in ("mR", "top1"):
                name = run.name if len({one.row for one in run.scores}) == 1 else f"{run.name}: {score.row}"
                groups.setdefault((score.dataset, score.metric), {})[name] = score.value
    shared = {key: found for key, found in groups.items() if 1 < len(found) <= 6}
    if not shared:
        return None
    names = list(dict.fromkeys(name for found in shared.values() for name in found))
    if len(names) > 6:
        return None
    labels = [f"{dataset}, {FIGURES[metric]}" for dataset, metric in shared]
    values = [[found.get(name) for found in shared.values()] for name in names]
    return Bars(names, [BarPanel(labels, values)], title="Test sets at a glance", maximum=100.0, unit="%")


def _curves(runs: Sequence[RunResult]) -> Block | None:
    panels = []
    for key, label in FIGURES.items():
        series = [_series(run, "validation", key, at) for at, run in enumerate(runs)]
        if kept := [one for one in series if one is not None]:
            panels.append(LinePanel(kept, title=label, x_label="step", y_label="%, validation", digits=1))
    for term in _TERMS:
        series = [_series(run, "train", term, at) for at, run in enumerate(runs)]
        kept = [one for one in series if one is not None]
        if kept:
            smooth = 9 if min(len(one.xs) for one in kept) > _SMOOTHED else 1
            panels.append(LinePanel(kept, title=term, x_label="step", y_label="training", smooth=smooth))
    if not panels:
        return None
    return Lines(panels, title="Training", note="Losses of runs with different objectives or draws do not compare.")


def _series(run: RunResult, kind: str, key: str, place: int) -> Series | None:
    """A line in the run's own colour, on every panel the same; grey, the last one, comes last."""
    points = [
        (float(record["step"]), float(record[key]))
        for record in run.history
        if record.get("kind") == kind and isinstance(record.get(key), (int, float)) and "step" in record
    ]
    if len(points) < 2:
        return None
    return Series(run.name, [x for x, _ in points], [y for _, y in points], color=(place + 1) % PALETTE_SIZE)


def _differences(runs: Sequence[RunResult]) -> Block | None:
    """A table for each link that several runs are of: recipes of different links have few keys in common."""
    links: dict[str, list[RunResult]] = {}
    for run in runs:
        if run.recipe:
            links.setdefault(str(run.recipe.get("link", "")), []).append(run)
    groups = {link: found for link, found in links.items() if len(found) > 1}
    if not groups:
        return None
    blocks: list[Block] = []
    for link, found in groups.items():
        title = f"The {link} link" if len(groups) > 1 else ""
        differing = differences(found)
        columns = [Column("Key", numeric=False), *(Column(run.name, numeric=False) for run in found)]
        rows = [TableRow([key, *(_short(value) for value in values)]) for key, values in differing.items()]
        blocks.append(Table(columns, rows, title=title) if rows else Text("Nothing.", title=title))
        same = [(key, _short(value)) for key, value in flatten(found[0].recipe) if key not in differing]
        blocks.append(Details(f"What is the same: {len(same)} keys", [Facts(same)]))
    return Group("What differs between the recipes", blocks, lead="Everything that is not in the table is the same.")


def _short(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        parts = [_short(item) or "–" for item in value]
        text = "; ".join(parts) if any(isinstance(item, Mapping) for item in value) else ", ".join(parts)
    elif isinstance(value, Mapping):
        text = ", ".join(f"{key} {_short(inner)}" for key, inner in value.items() if inner not in (None, "", []))
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 4 * _LONG else text[: 4 * _LONG] + " …"


def _each(runs: Sequence[RunResult]) -> Block:
    folds: list[Block] = []
    for run in runs:
        blocks: list[Block] = [Facts(list(run.facts))] if run.facts else []
        if run.recipe_text:
            blocks.append(Code(run.recipe_text, language="yaml"))
        folds.append(Details(run.name, blocks or [Text("Nothing more is known.")]))
    return Group("Each run", folds, lead="Where it lies, what it was made of, and its recipe.")
