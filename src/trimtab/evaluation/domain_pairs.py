"""The pairs in the report of the domain link: how hard they are, the hardest with pictures, what was dropped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.data.images import StoredPicture
from trimtab.evaluation.blocks import Cell, Column, Group, Histogram, Table, TableRow
from trimtab.evaluation.charts import ticks
from trimtab.evaluation.escape import shortened

_LARGEST = 1e100
_CAPTION = 160  # letters; a product's description may be a page


def difficulty_histogram(
    before: Sequence[float] | np.ndarray,
    now: Sequence[float] | np.ndarray,
    *,
    label: str = "difficulty",
    names: tuple[str, str] = ("base", "after training"),
    bins: int = 24,
    title: str = "",
    note: str = "",
) -> Histogram:
    """How difficulty is spread over the pairs before and after training, and how many became easier or harder.

    Args:
        before: (N,) of each pair for the base, higher is harder; NaN where it was not measured.
        now: (N,) of the same pairs after training.
        label: name of the axis.
        names: of the two layers.
        bins: about how many, at least 5; their edges are round numbers.
        title: heading.
        note: text beside the chart.

    Raises:
        ValueError: when nothing was measured, or `before` and `now` are not of the same pairs.
    """
    pair = np.stack([np.asarray(before, np.float64), np.asarray(now, np.float64)])
    usable = [values[np.abs(values) < _LARGEST] for values in pair]
    everything = np.concatenate(usable)
    if not len(everything):
        raise ValueError("no pair has a difficulty")
    edges = _round_edges(float(everything.min()), float(everything.max()), bins)
    both = pair[:, (np.abs(pair) < _LARGEST).all(axis=0)]
    told = [note] if note else []
    if both.size:
        easier, harder = (100 * float(np.mean(sign * (both[1] - both[0]) > 0)) for sign in (-1, 1))
        told.append(f"{easier:.0f}% of the pairs became easier, {harder:.0f}% harder. Dashed lines are medians.")
    if lost := pair.shape[1] - both.shape[1]:
        told.append(f"{lost:,} pairs were not measured both times.")
    return Histogram(
        names,
        edges.tolist(),
        [np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist() for values in usable],
        title=title,
        note="\n\n".join(told),
        x_label=label,
        y_label="% of pairs",
        marks=[float(np.median(values)) if len(values) else None for values in usable],
    )


def hardest_pairs(
    pairs: Iterable[Mapping[str, Any]],
    *,
    limit: int = 24,
    scale: float = 0.0,
    digits: int = 2,
    label: str = "Difficulty",
    title: str = "Hardest pairs",
    note: str = "",
) -> Group | None:
    """The pairs with the highest difficulty now, with pictures; None when there are none.

    Args:
        pairs: each with ``image`` (whatever `trimtab.data.images.read_image` takes), ``caption``, ``prefers`` (the
            caption that the model puts above it, or ""), ``before`` and ``now`` (difficulty for the base and for the
            model now, higher is harder, None if not measured), ``drawn`` (times), ``file`` and ``row`` (where the
            pair stands; no row for a picture in a folder).
        limit: pairs shown.
        scale: end of the scale of a thin bar for difficulty; 0 for none.
        digits: decimals of difficulty.
        label: what difficulty is called.
        title: heading.
        note: small print below.
    """
    ordered = sorted(pairs, key=lambda pair: -_number(pair["now"], -math.inf))
    if not ordered:
        return None
    body = []
    for pair in ordered[:limit]:
        stuck = pair["drawn"] > 0 and _number(pair["now"], -math.inf) >= _number(pair["before"], math.inf)
        body.append(
            TableRow(
                [
                    Cell(picture_name(pair["image"]), picture=pair["image"]),
                    shortened(pair["caption"], _CAPTION),
                    shortened(pair["prefers"], _CAPTION) or "nothing else",
                    Cell(pair["before"]),
                    Cell(pair["now"], "no easier" if stuck else "", "caution" if stuck else "plain"),
                    pair["drawn"],
                    str(pair["file"]) if pair.get("row") is None else f"{pair['file']}, row {pair['row']}",
                ]
            )
        )
    columns = [
        Column("Picture", numeric=False),
        Column("Its caption", numeric=False),
        Column("The model prefers", numeric=False),
        Column("base", label, digits, scale),
        Column("now", label, digits, scale),
        Column("Drawn"),
        Column("Where", numeric=False),
    ]
    lead = (
        "Look here for wrong labels: a caption that does not belong to its picture stays hard however often it is "
        "drawn. Mend or remove the row, and train again. `no easier` marks pairs that training did not help."
    )
    return Group(title, [Table(columns, body, note=note)], lead=lead)


def cleaning_table(counts: Mapping[str, Mapping[str, int]], *, title: str = "Pairs read, dropped and kept") -> Table:
    """What each rule dropped, a column per split or source; rules that dropped nothing are left out.

    Args:
        counts: by split, then by rule; ``kept`` is what remains.
    """
    rules = dict.fromkeys(
        rule for split in counts.values() for rule, count in split.items() if count and rule != "kept"
    )
    body = [TableRow(["read", *(sum(split.values()) for split in counts.values())])]
    body += [
        TableRow([f"dropped: {rule.replace('_', ' ')}", *(split.get(rule, 0) for split in counts.values())])
        for rule in rules
    ]
    kept = [
        Cell(split.get("kept", 0), f"{100 * split.get('kept', 0) / max(1, sum(split.values())):.1f}%")
        for split in counts.values()
    ]
    body.append(TableRow(["kept", *kept], strong=True))
    return Table([Column("Pairs", numeric=False), *map(Column, counts)], body, title=title)


def picture_name(source: Any) -> str:
    """Name of a picture's file, for a table."""
    return Path(str(source)).name if isinstance(source, (str, Path, StoredPicture)) else "picture in memory"


def _round_edges(low: float, high: float, bins: int) -> np.ndarray:
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-6):
        low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)
    inner = ticks(low, high, count=max(bins, 5))  # at least two fall inside
    step = inner[1] - inner[0]
    before = [inner[0] - step] if inner[0] > low else []
    after = [inner[-1] + step] if inner[-1] < high else []
    return np.array([*before, *inner, *after])


def _number(value: float | None, otherwise: float) -> float:
    return otherwise if value is None or math.isnan(value) else float(value)
