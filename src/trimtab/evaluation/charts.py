"""Charts as inline SVG: no script, no fonts of their own, colours from the page's style sheet.

Panels are drawn about as wide as a phone, so that their letters stay readable there, and grow a little where
there is room. Colours are the classes ``c0`` to ``c5``; the style sheet sets them for light and dark pages.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from trimtab.evaluation.blocks import (
    PALETTE_SIZE,
    BarPanel,
    Bars,
    LinePanel,
    Series,
    format_compact,
    format_value,
)
from trimtab.evaluation.escape import escape

WIDTH = 400
MAX_POINTS = 300

_BAR, _BAR_GAP, _GROUP_GAP = 13, 4, 14
_LABEL_WIDTH, _VALUE_WIDTH = 46, 38
_LINE_HEIGHT = 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 20, 40

Point = tuple[float, float]


def bars_svg(bars: Bars, panel: BarPanel) -> str:
    """Horizontal bars, a group per block of lines, each with its value at the end."""
    maximum = bars.maximum or _nice_ceiling(max(_finite(panel_values(bars)), default=1.0))
    left = min(max(_LABEL_WIDTH, *(_text_width(group) + 12 for group in panel.groups)), WIDTH // 3)
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
            shown = format_value(value, bars.digits)
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
            f"{group} {format_value(value, bars.digits)}{bars.unit if value is not None else ''}"
            for group, value in zip(panel.groups, values)
        )
        for name, values in zip(bars.series, panel.values)
    ]
    return f"{panel.title or bars.title}. " + "; ".join(lines)


def panel_values(bars: Bars) -> list[float | None]:
    """All values of all panels, since they share a scale."""
    return [value for panel in bars.panels for values in panel.values for value in values]


def lines_svg(panel: LinePanel) -> str:
    """Lines with axes, each ending in a dot."""
    usable = [_usable(series, panel) for series in panel.series]
    everything = [point for points in usable for point in points if math.isfinite(point[1])]
    if not everything:
        message = '<text class="tick empty" x="200" y="60">nothing was recorded</text>'
        return _svg(120, f"{panel.title}. Nothing was recorded.", [message], "lines")
    xs, ys = zip(*everything)
    x_low, x_high = _range(xs, panel.log_x, pad=False)
    y_low, y_high = _range(ys, panel.log_y, pad=True)
    width, height = WIDTH - _LEFT - _RIGHT, _LINE_HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> Point:
        return (
            _LEFT + width * _fraction(x, x_low, x_high, panel.log_x),
            _TOP + height * (1 - _fraction(y, y_low, y_high, panel.log_y)),
        )

    parts = []
    for tick in ticks(y_low, y_high, panel.log_y):
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick y" x="{_LEFT - 8}" y="{y:.1f}">{format_compact(tick)}</text>')
    base = _TOP + height
    for tick in ticks(x_low, x_high, panel.log_x, count=6):
        x = place(tick, y_low)[0]
        parts.append(f'<text class="tick x" x="{x:.1f}" y="{base + 15}">{format_compact(tick)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="name" x="{_LEFT + width / 2}" y="{_LINE_HEIGHT - 5}">{escape(panel.x_label)}</text>')
    if panel.mark is not None and x_low <= panel.mark[0] <= x_high:
        x = place(panel.mark[0], y_low)[0]
        label_x = min(max(x, _LEFT + 20.0), WIDTH - _RIGHT - 20.0)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base}"/>')
        parts.append(f'<text class="marked" x="{label_x:.1f}" y="{_TOP - 9}">{escape(panel.mark[1])}</text>')
    for number, points in enumerate(usable):
        color = line_color(number)
        title = f"<title>{escape(panel.series[number].name)}</title>"
        if panel.smooth > 1:
            raw = [place(*point) for point in thin(points, MAX_POINTS)]
            parts.append(_path(raw, f"line raw {color}", title))
            points = smoothed(points, panel.smooth)
        placed = [place(*point) for point in thin(points, MAX_POINTS)]
        parts.append(_path(placed, f"line {color}", title))
        if ends := [point for point in placed if math.isfinite(point[1])]:
            x, y = ends[-1]
            parts.append(f'<circle class="end {color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return _svg(_LINE_HEIGHT, line_summary(panel), parts, "lines")


def line_color(number: int) -> str:
    """Class of a series of lines; grey, which stands for the reference among bars, comes last."""
    return f"c{(number + 1) % PALETTE_SIZE}"


def line_summary(panel: LinePanel) -> str:
    """First and last value of each line, in words."""
    told = []
    for series in panel.series:
        if values := [y for _, y in _usable(series, panel) if math.isfinite(y)]:
            told.append(f"{series.name} from {format_compact(values[0])} to {format_compact(values[-1])}")
    axes = f" ({panel.y_label} over {panel.x_label})" if panel.y_label and panel.x_label else ""
    return f"{panel.title}{axes}. " + "; ".join(told)


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


def _range(values: Sequence[float], log: bool, *, pad: bool) -> tuple[float, float]:
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
    # A loss or a score near zero reads better with zero on the axis.
    bottom = 0.0 if 0 <= low < 0.35 * high else low - slack
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


def _text_width(text: str) -> int:
    """Rough width in the chart's units; ideographs are twice as wide as letters."""
    return sum(13 if unicodedata.east_asian_width(char) in "WF" else 7 for char in text)


def _shortened(text: str, width: int) -> str:
    if _text_width(text) <= width:
        return text
    while text and _text_width(text) > width - 7:
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


def _svg(height: float, summary: str, parts: Sequence[str], kind: str) -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(summary)}">{"".join(parts)}</svg>'
    )
