"""What a report is made of. Blocks hold values and text, never markup; `page` and `markdown` draw them.

All text is plain: whatever a user's captions contain is shown, not interpreted. In the prose of `Text`, and in
leads and notes, back-quoted words are set as code, a blank line starts a paragraph and "- " an item of a list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Tone = Literal["plain", "good", "caution", "bad"]
Value: TypeAlias = "str | int | float | None"

PALETTE_SIZE = 6


@dataclass(frozen=True)
class Tile:
    """One key figure: label above, value and unit large, note below."""

    label: str
    value: Value
    unit: str = ""
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tiles:
    """Key figures side by side."""

    tiles: Sequence[Tile]
    title: str = ""


@dataclass(frozen=True)
class Text:
    """Prose. A tone other than "plain" sets it apart as a note or warning."""

    text: str
    title: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Column:
    """A column; neighbours with the same `group` share a heading above theirs.

    Attributes:
        label: its heading.
        group: heading above it.
        digits: decimals of floats.
        meter: draw numbers as thin bars too, on a scale from 0 to this value; 0 for none.
        numeric: align to the right.
    """

    label: str
    group: str = ""
    digits: int = 1
    meter: float = 0.0
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A value with small print below it; None shows as "–".

    Attributes:
        picture: whatever `trimtab.data.images.read_image` takes; drawn small in place of the value, which then
            names it for those who do not see it, and in Markdown.
    """

    value: Value
    note: str = ""
    tone: Tone = "plain"
    picture: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class TableRow:
    """Cells in column order; `strong` marks the row that matters, `empty` says why one has no figures."""

    cells: Sequence[Cell | str | int | float | None]
    strong: bool = False
    empty: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows.

    Raises:
        ValueError: when a row has another number of cells than there are columns (one, if it is `empty`).
    """

    columns: Sequence[Column]
    rows: Sequence[TableRow]
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            wanted = 1 if row.empty else len(self.columns)
            if len(row.cells) != wanted:
                raise ValueError(f"row {number} of {self.title!r} has {len(row.cells)} cells, not {wanted}")


@dataclass(frozen=True)
class BarPanel:
    """Groups of bars; ``values[s][g]`` is series `s` in group `g`, None where there is none."""

    groups: Sequence[str]
    values: Sequence[Sequence[float | None]]
    title: str = ""


@dataclass(frozen=True)
class Bars:
    """Panels of grouped bars that share series, colours and scale.

    Attributes:
        series: their names.
        panels: drawn side by side where there is room.
        colors: one place in the palette per series; in order by default.
        maximum: end of the scale; None for the largest value.
        unit: put after the values in texts for screen readers.
    """

    series: Sequence[str]
    panels: Sequence[BarPanel]
    title: str = ""
    note: str = ""
    colors: Sequence[int] = ()
    maximum: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        for panel in self.panels:
            if [len(values) for values in panel.values] != [len(panel.groups)] * len(self.series):
                raise ValueError(f"panel {panel.title!r} must have a value per series and group")
        if self.colors and len(self.colors) != len(self.series):
            raise ValueError(f"{len(self.colors)} colors for {len(self.series)} series")

    def color(self, index: int) -> int:
        """Place in the palette of a series."""
        return (self.colors[index] if self.colors else index) % PALETTE_SIZE


@dataclass(frozen=True)
class Series:
    """One line; values that are not finite leave a gap.

    Attributes:
        labels: one per point, empty ones for none; each point is then drawn with a mark of the line's own shape, as
            few points are in any case.
        color: place in the palette; None for the next by order.
        spread: of each point, drawn as a whisker that far up and down.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    labels: Sequence[str] = ()
    color: int | None = None
    spread: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.spread and len(self.spread) != len(self.xs):
            raise ValueError(f"series {self.name!r} has {len(self.xs)} points and {len(self.spread)} spreads")
        if len(self.xs) != len(self.ys):
            raise ValueError(f"series {self.name!r} has {len(self.xs)} x and {len(self.ys)} y")
        if self.labels and len(self.labels) != len(self.xs):
            raise ValueError(f"series {self.name!r} has {len(self.xs)} points and {len(self.labels)} labels")


@dataclass(frozen=True)
class LinePanel:
    """Lines over one pair of axes; values at or below 0 are left out on a log axis.

    Attributes:
        smooth: also draw each line through the mean of this many neighbouring points, the raw one faint.
        mark: an x to point at, such as the checkpoint that was kept, and its label.
        tall: half as high again, for lines whose shape matters more than their ends.
    """

    series: Sequence[Series]
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    smooth: int = 1
    mark: tuple[float, str] | None = None
    digits: int = 3
    tall: bool = False

    def color(self, index: int) -> int:
        """Place in the palette of a series; grey, which stands for the reference among bars, comes last."""
        own = self.series[index].color
        return (index + 1 if own is None else own) % PALETTE_SIZE


@dataclass(frozen=True)
class Lines:
    """Panels of line charts, side by side where there is room."""

    panels: Sequence[LinePanel]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """How often values of each size occur, a layer per set of values; heights are percent of the set.

    Attributes:
        names: of the sets.
        edges: of the bins, ascending, one more than there are bins.
        counts: ``counts[s][b]`` values of set `s` lie in bin `b`.
        marks: a value to point at per set, such as its median; None for none.
        mark_name: what the marks are.
    """

    names: Sequence[str]
    edges: Sequence[float]
    counts: Sequence[Sequence[int]]
    title: str = ""
    note: str = ""
    x_label: str = ""
    y_label: str = "%"
    marks: Sequence[float | None] = ()
    mark_name: str = "median"

    def __post_init__(self) -> None:
        if [len(counts) for counts in self.counts] != [len(self.edges) - 1] * len(self.names) or len(self.edges) < 2:
            raise ValueError(f"histogram {self.title!r} must have a count per set and bin, and one edge more than bins")
        if any(before >= after for before, after in zip(self.edges, self.edges[1:])):
            raise ValueError(f"the edges of histogram {self.title!r} must ascend")
        if self.marks and len(self.marks) != len(self.names):
            raise ValueError(f"{len(self.marks)} marks for {len(self.names)} sets")

    @property
    def shares(self) -> list[list[float]]:
        """Percent of each set in each bin; 0 where the set is empty."""
        return [[100 * count / max(1, sum(counts)) for count in counts] for counts in self.counts]


@dataclass(frozen=True)
class GridImage:
    """A found picture (whatever `trimtab.data.images.read_image` takes), its caption, and if it is right."""

    source: Any = field(repr=False)
    caption: str = ""
    correct: bool = False


@dataclass(frozen=True)
class GridQuery:
    """A query, what it means in English, its language tag, and the pictures found, best first."""

    text: str
    images: Sequence[GridImage]
    meaning: str = ""
    language: str = ""


@dataclass(frozen=True)
class ImageGrid:
    """Queries with the pictures that they found; right ones are framed."""

    queries: Sequence[GridQuery]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and values, one a line."""

    items: Sequence[tuple[str, Value]]
    title: str = ""


@dataclass(frozen=True)
class Code:
    """Text shown as it is: a recipe, a command."""

    text: str
    title: str = ""
    language: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks behind a line that unfolds."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Group:
    """Blocks under one heading, after a sentence that says what they show."""

    title: str
    blocks: Sequence[Block]
    lead: str = ""


Block: TypeAlias = "Tiles | Text | Table | Bars | Lines | Histogram | ImageGrid | Facts | Code | Details | Group"


def as_cell(cell: Cell | str | int | float | None) -> Cell:
    """A bare value as a cell without small print."""
    return cell if isinstance(cell, Cell) else Cell(cell)


def format_value(value: Value, digits: int = 1) -> str:
    """Floats to `digits` decimals, integers with commas between thousands, nothing as "–"."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def format_compact(value: float) -> str:
    """For axes and legends: three significant digits, thousands as k, millions as M."""
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{suffix}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"
