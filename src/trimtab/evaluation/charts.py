"""Charts as inline SVG: no script, no fonts of their own, colours from the page's style sheet.

Panels are drawn about as wide as a phone, so that their letters stay readable there, and grow a little where
there is room. Colours are the classes ``c0`` to ``c5``; the style sheet sets them for light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trimtab.evaluation.blocks import (
    PALETTE_SIZE,
    BarPanel,
    Bars,
    Histogram,
    LinePanel,
    Series,
    format_compact,
    format_value,
)
from trimtab.evaluation.escape import escape
from trimtab.evaluation.labels import NamedPoint, Point, label_places, next_to_equal, text_width

WIDTH = 400
MAX_POINTS = 300

_BAR, _BAR_GAP, _GROUP_GAP = 13, 4, 14
_LABEL_WIDTH, _VALUE_WIDTH = 46, 38
_LINE_HEIGHT = 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 20, 40
_MOST_TICKS = 8
_MOST_MARKS = 12


@dataclass(frozen=True)
class Frame:
    """Axes, and where values lie on them."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False
    log_y: bool = False
    height: int = _LINE_HEIGHT
    x_ticks: tuple[float, ...] = ()
    """Instead of round numbers."""

    @property
    def base(self) -> int:
        """Height of the lower axis, from the top."""
        return self.height - _BOTTOM

    def place(self, x: float, y: float) -> Point:
        return (
            _LEFT + (WIDTH - _LEFT - _RIGHT) * _fraction(x, *self.x, self.log_x),
            _TOP + (self.base - _TOP) * (1 - _fraction(y, *self.y, self.log_y)),
        )

    def axes(self, x_label: str) -> list[str]:
        parts = []
        for tick in ticks(*self.y, self.log_y):
            y = self.place(self.x[0], tick)[1]
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick y" x="{_LEFT - 8}" y="{y:.1f}">{format_compact(tick)}</text>')
        for tick in self.x_ticks or ticks(*self.x, self.log_x, count=6):
            x = self.place(tick, self.y[0])[0]
            parts.append(f'<text class="tick x" x="{x:.1f}" y="{self.base + 15}">{format_compact(tick)}</text>')
        middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
        parts.append(
            f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{self.base}" y2="{self.base}"/>'
            f'<text class="name" x="{middle}" y="{self.height - 5}">{escape(x_label)}</text>'
        )
        return parts


def bars_svg(bars: Bars, panel: BarPanel) -> str:
    """Horizontal bars, a group per block of lines, each with its value at the end."""
    maximum = bars.maximum or _nice_ceiling(max(_finite(panel_values(bars)), default=1.0))
    left = min(max(_LABEL_WIDTH, *(text_width(group) + 12 for group in panel.groups)), WIDTH // 3)
    room = WIDTH - left - _VALUE_WIDTH
    block = len(bars.series) * (_BAR + _BAR_GAP) - _BAR_GAP
    height = len(panel.groups) * (block + _GROUP_GAP) - _GROUP_GAP + 4
    parts = []
    for at, group in enumerate(panel.groups):
        top = 2 + at * (block + _GROUP_GAP)
        middle = top + block / 2
        label = escape(_shortened(group, left - 12))
        parts.append(
            f'<text class="group" x="{left - 10}" y="{middle:.1f}"><title>{escape(group)}</title>{label}</text>'
        )
        for number, name in enumerate(bars.series):
            value = panel.values[number][at]
            y = top + number * (_BAR + _BAR_GAP)
            shown = format_value(value)
            known = value is not None and math.isfinite(value)
            length = max(0.0, min(1.0, (value or 0.0) / maximum)) * room if known else 0.0
            hint = escape(f"{name}, {group}: {shown}{bars.unit}" if known else f"{name}, {group}: not available")
            parts.append(
                f'<g><title>{hint}</title><rect class="track" x="{left}" y="{y}" width="{room}" '
                f'height="{_BAR}" rx="3"/>'
                f'<rect class="fill c{bars.color(number)}" x="{left}" y="{y}" width="{length:.1f}" '
                f'height="{_BAR}" rx="3"/>'
                f'<text class="value" x="{WIDTH}" y="{y + _BAR / 2:.1f}">{escape(shown)}</text></g>'
            )
    return _svg(height, bar_summary(bars, panel), parts, "bars")


def bar_summary(bars: Bars, panel: BarPanel) -> str:
    """One sentence of all values, for those who do not see the chart."""
    lines = [
        f"{name}: "
        + ", ".join(
            f"{group} {format_value(value)}{bars.unit if value is not None else ''}"
            for group, value in zip(panel.groups, values)
        )
        for name, values in zip(bars.series, panel.values)
    ]
    return f"{panel.title or bars.title}. " + "; ".join(lines)


def panel_values(bars: Bars) -> list[float | None]:
    """All values of all panels, since they share a scale."""
    return [value for panel in bars.panels for values in panel.values for value in values]


def lines_svg(panel: LinePanel) -> str:
    """Lines with axes, told apart without colours too: few points have marks, lines of many are dashed."""
    usable = [_usable(series, panel) for series in panel.series]
    everything = [point for points in usable for point in points if math.isfinite(point[1])]
    if not everything:
        return _nothing(panel.title, "lines")
    xs, ys = zip(*everything, *(end for series in panel.series for end in _whisker_ends(series)))
    labelled = any(series.labels for series in panel.series)
    frame = Frame(
        _range(xs, panel.log_x, pad=labelled, from_zero=not labelled),
        _range(ys, panel.log_y, pad=True, from_zero=not labelled),
        panel.log_x,
        panel.log_y,
        round(1.5 * _LINE_HEIGHT) if panel.tall else _LINE_HEIGHT,
        # Sizes that were measured, such as 1, 4 and 16 pictures, are seldom round numbers.
        tuple(measured) if panel.log_x and len(measured := sorted(set(xs))) <= _MOST_TICKS else (),
    )
    parts = frame.axes(panel.x_label)
    if panel.mark is not None and frame.x[0] <= panel.mark[0] <= frame.x[1]:
        x = frame.place(panel.mark[0], frame.y[0])[0]
        label_x = min(max(x, _LEFT + 20.0), WIDTH - _RIGHT - 20.0)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{frame.base}"/>')
        parts.append(f'<text class="marked" x="{label_x:.1f}" y="{_TOP - 9}">{escape(panel.mark[1])}</text>')
    marks: list[str] = []
    named: list[NamedPoint] = []
    colors: list[int] = []
    tracks = []
    for number, (series, points) in enumerate(zip(panel.series, usable)):
        color = panel.color(number)
        title = f"<title>{escape(series.name)}</title>"
        if panel.smooth > 1:
            raw = [frame.place(*point) for point in thin(points, MAX_POINTS)]
            parts.append(_path(raw, f"line raw c{color}", title))
            points = smoothed(points, panel.smooth)
        placed = [frame.place(*point) for point in (points if series.labels else thin(points, MAX_POINTS))]
        parts.append(_path(placed, f"line c{color}{' dashed' if _is_dashed(panel, series) else ''}", title))
        ends = [point for point in placed if math.isfinite(point[1])]
        tracks.append(ends)
        for x, y, by in _whiskers(series):
            hint = f"{series.name}, {panel.x_label} {format_compact(x)}: {format_compact(y)} ± {format_compact(by)}"
            whisker = [frame.place(x, y - by), frame.place(x, y + by)]
            parts.append(_path(whisker, f"whisker c{color}", f"<title>{escape(hint)}</title>"))
        if _is_marked(panel, series):
            for (x, y), hint, text in _marked(series, panel, frame):
                marks.append(f"<g><title>{escape(hint)}</title>{marker(color, x, y)}</g>")
                if series.labels:
                    named.append(((x, y), text))
                    colors.append(color)
        elif ends:
            x, y = ends[-1]
            marks.append(f'<circle class="end c{color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    parts += marks
    places = label_places(named, tracks, (_LEFT, _TOP - 8.0, WIDTH - 2.0, frame.base))
    for at, (center, color) in enumerate(zip(places, colors)):
        if center is not None:
            # A label that serves the points of several lines has no line's colour.
            owner = "" if next_to_equal(named[at + 1 :], named[at]) else f" c{color}"
            x, y = center
            parts.append(f'<text class="label{owner}" x="{x:.1f}" y="{y:.1f}">{escape(named[at][1])}</text>')
    return _svg(frame.height, line_summary(panel), parts, "lines")


def swatch(panel: LinePanel, number: int) -> str:
    """What a line looks like, for a legend."""
    color, series = panel.color(number), panel.series[number]
    if _is_marked(panel, series):
        shown = marker(color)
    elif _is_dashed(panel, series):
        shown = f'<path class="line c{color} dashed" d="M-14 0H14"/>'
    else:
        return f'<i class="c{color}"></i>'
    side = 7 if _is_marked(panel, series) else 14
    return f'<svg class="swatch" viewBox="-{side} -7 {2 * side} 14" aria-hidden="true">{shown}</svg>'


def _is_marked(panel: LinePanel, series: Series) -> bool:
    """Whether each point gets a mark of the line's own shape."""
    return bool(series.labels) or (len(series.xs) <= _MOST_MARKS and panel.smooth <= 1)


def _is_dashed(panel: LinePanel, series: Series) -> bool:
    return len(panel.series) > 1 and not _is_marked(panel, series)


def _whiskers(series: Series) -> Iterator[tuple[float, float, float]]:
    """Each point that has a spread, and how far that reaches up and down."""
    for x, y, by in zip(series.xs, series.ys, series.spread):
        if math.isfinite(y) and by > 0:
            yield x, y, by


def _whisker_ends(series: Series) -> Iterator[Point]:
    for x, y, by in _whiskers(series):
        yield from ((x, y - by), (x, y + by))


def line_summary(panel: LinePanel) -> str:
    """First and last value of each line, or every labelled point, in words."""
    told = []
    for series in panel.series:
        if series.labels:
            points = ", ".join(
                f"{label or 'point'} ({format_compact(x)}, {format_compact(y)})"
                for label, x, y in zip(series.labels, series.xs, series.ys)
                if math.isfinite(x) and math.isfinite(y)
            )
            told.append(f"{series.name}: {points}")
        elif values := [y for _, y in _usable(series, panel) if math.isfinite(y)]:
            told.append(f"{series.name} from {format_compact(values[0])} to {format_compact(values[-1])}")
            told[-1] += f" (spread {format_compact(max(series.spread))} at most)" if series.spread else ""
    axes = f" ({panel.y_label} over {panel.x_label})" if panel.y_label and panel.x_label else ""
    return f"{panel.title}{axes}. " + "; ".join(told)


def marker(color: int, x: float = 0.0, y: float = 0.0) -> str:
    """A mark whose shape goes with its colour, so that lines are told apart without seeing colours."""
    r = 4.6
    corners = {
        0: [(-1.0, -0.3), (1.0, -0.3), (1.0, 0.3), (-1.0, 0.3)],
        2: [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        3: [(0.0, 1.1), (1.1, -0.85), (-1.1, -0.85)],
        4: [(0.0, -1.25), (1.1, 0.0), (0.0, 1.25), (-1.1, 0.0)],
        5: [(0.0, -1.1), (1.1, 0.85), (-1.1, 0.85)],
    }.get(color)
    if corners is None:
        return f'<circle class="point c{color}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    shape = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
    return f'<polygon class="point c{color}" points="{shape}"/>'


def histogram_svg(histogram: Histogram) -> str:
    """Layers of steps over one another, each with a dashed line at its mark."""
    shares = histogram.shares
    top = max((share for layer in shares for share in layer), default=0.0)
    if not top:
        return _nothing(histogram.title, "lines")
    edges = [float(edge) for edge in histogram.edges]
    frame = Frame((edges[0], edges[-1]), (0.0, 1.06 * top))
    parts = frame.axes(histogram.x_label)
    for number, layer in enumerate(shares):
        steps = [frame.place(x, share) for at, share in enumerate(layer) for x in edges[at : at + 2]]
        corners = " ".join(f"L{x:.1f} {y:.1f}" for x, y in [*steps, frame.place(edges[-1], 0.0)])
        x, y = frame.place(edges[0], 0.0)
        color = number % PALETTE_SIZE
        parts.append(f'<path class="area c{color}" d="M{x:.1f} {y:.1f} {corners}Z"/>')
        parts.append(_path(steps, f"line c{color}", ""))
    for number, mark in enumerate(histogram.marks):
        if mark is not None and edges[0] <= mark <= edges[-1]:
            x = frame.place(mark, 0.0)[0]
            parts.append(
                f'<line class="mark own c{number % PALETTE_SIZE}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" '
                f'y2="{frame.base}"/>'
            )
    for at, (low, high) in enumerate(pairwise(edges)):
        values = ", ".join(f"{name} {layer[at]:.1f}%" for name, layer in zip(histogram.names, shares))
        hint = escape(f"{format_compact(low)} to {format_compact(high)}: {values}")
        left, right = frame.place(low, 0.0)[0], frame.place(high, 0.0)[0]
        parts.append(
            f'<rect class="hit" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
            f'height="{frame.base - _TOP}"><title>{hint}</title></rect>'
        )
    return _svg(frame.height, histogram_summary(histogram), parts, "lines")


def histogram_summary(histogram: Histogram) -> str:
    """Where each set has most values, and its mark, in words."""
    told = []
    for number, (name, layer) in enumerate(zip(histogram.names, histogram.shares)):
        mark = histogram.marks[number] if histogram.marks else None
        pointed = "" if mark is None else f"{histogram.mark_name} {format_compact(mark)}, "
        most = max(range(len(layer)), key=layer.__getitem__)
        low, high = (format_compact(edge) for edge in histogram.edges[most : most + 2])
        told.append(f"{name}: {pointed}most from {low} to {high} ({layer[most]:.0f}%)")
    return f"{histogram.title or histogram.x_label}. " + "; ".join(told)


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list[float]:
    """Round numbers inside [low, high]: steps of 1, 2 or 5; on a log axis powers of ten when they suffice."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        stride = max(1, math.ceil((last - first) / count))
        tens = [10.0**power for power in range(first, last + 1, stride) if low <= 10.0**power <= high]
        if len(tens) >= 3:
            return tens
        fine = [
            lead * 10.0**power
            for power in range(first, last + 1)
            for lead in (1, 2, 5)
            if low <= lead * 10.0**power <= high
        ]
        if len(fine) >= 2:
            return fine
    step = _step((high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most about `limit` points: the lowest and highest of each stretch, so that spikes stay visible."""
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = [points[0]]
    stretch = 2 * (len(points) - 2) / (limit - 2)
    start = 1.0
    while round(start) < len(points) - 1:
        part = points[round(start) : min(round(start + stretch), len(points) - 1)]
        if part:
            finite = [point for point in part if math.isfinite(point[1])] or [part[0]]
            kept.extend(sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}))
        start += stretch
    return [*kept, points[-1]]


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Each y replaced by the mean of its neighbours, `window` in all, fewer at the ends."""
    half = window // 2
    result = []
    for at, (x, y) in enumerate(points):
        near = _finite([value for _, value in points[max(0, at - half) : at + half + 1]])
        result.append((x, sum(near) / len(near)) if near and math.isfinite(y) else (x, math.nan))
    return result


def _usable(series: Series, panel: LinePanel) -> list[Point]:
    return [
        (float(x), float(y) if _drawable(y, panel.log_y) else math.nan)
        for x, y in zip(series.xs, series.ys)
        if _drawable(x, panel.log_x)
    ]


def _drawable(value: float, log: bool) -> bool:
    """Finite, and not so large or small that ratios and differences stop being so."""
    return (1e-100 if log else -1e100) < value < 1e100


def _range(values: Sequence[float], log: bool, *, pad: bool, from_zero: bool = True) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        if low == high:
            return low / 2, high * 2
        slack = (high / low) ** 0.05 if pad else 1.0
        return low / slack, high * slack
    if low == high:
        return low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    if not pad:
        return low, high
    slack = 0.06 * (high - low)
    # A loss or a score near zero reads better with zero on the axis; two scores against each other do not.
    bottom = 0.0 if from_zero and 0 <= low < 0.35 * high else low - slack
    return bottom, high + slack


def _fraction(value: float, low: float, high: float, log: bool) -> float:
    if log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next((lead * power for lead in (1, 2, 5) if raw <= lead * power), 10 * power)


def _nice_ceiling(value: float) -> float:
    return _step(value) if value > 0 else 1.0


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _shortened(text: str, width: int) -> str:
    if text_width(text) <= width:
        return text
    while text and text_width(text) > width - 7:
        text = text[:-1]
    return text.rstrip() + "…"


def _path(points: Sequence[Point], classes: str, title: str) -> str:
    commands, pen_down = [], False
    for x, y in points:
        if not math.isfinite(y):
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = True
    return f'<path class="{classes}" d="{" ".join(commands)}">{title}</path>'


def _marked(series: Series, panel: LinePanel, frame: Frame) -> Iterator[tuple[Point, str, str]]:
    """Where each point that can be drawn lies, what it says, and its label."""
    for label, x, y in zip(series.labels or [""] * len(series.xs), series.xs, series.ys):
        if _drawable(x, panel.log_x) and _drawable(y, panel.log_y):
            values = f"{panel.x_label} {format_compact(x)}, {panel.y_label} {format_compact(y)}"
            yield frame.place(x, y), f"{series.name}{label and f', {label}'}: {values}", label


def _nothing(title: str, kind: str) -> str:
    message = '<text class="tick empty" x="200" y="60">nothing was recorded</text>'
    return _svg(120, f"{title}. Nothing was recorded.", [message], kind)


def _svg(height: float, summary: str, parts: Sequence[str], kind: str) -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(summary)}">{"".join(parts)}</svg>'
    )
