"""Where the labels of a chart's points can stand without hiding each other or what is drawn."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise

Point = tuple[float, float]
Box = tuple[float, float, float, float]
NamedPoint = tuple[Point, str]

_SIDES = ((1, 0), (0, -1), (-1, 0), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))


def label_places(points: Sequence[NamedPoint], lines: Sequence[Sequence[Point]], inside: Box) -> list[Point | None]:
    """Centres for the labels of points where they hide least; None for one that fits nowhere or is empty.

    Args:
        points: places and texts; of equal texts next to each other only the first gets a place.
        lines: what else is drawn, as corners of lines.
        inside: where labels may stand.
    """
    inked = [point for line in lines for point in _along(line)]
    taken: list[Box] = []
    result: list[Point | None] = []
    for at, ((x, y), text) in enumerate(points):
        best: tuple[Point, Box] | None = None
        half, least = text_width(text) / 2, math.inf
        for dx, dy in () if not text or next_to_equal(points[:at], points[at]) else _SIDES:
            center = (x + dx * (half + (7 if dy == 0 else 3)), y + dy * (13 if dx == 0 else 10))
            box = (center[0] - half, center[1] - 6.5, center[0] + half, center[1] + 6.5)
            outside = box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]
            if outside or any(_overlap(box, other) for other in taken):
                continue
            hidden = 8 * sum(_within(dot, box) for dot, _ in points) + sum(_within(point, box) for point in inked)
            if hidden < least:
                best, least = (center, box), hidden
        if best is not None:
            taken.append(best[1])
        result.append(best[0] if best else None)
    return result


def next_to_equal(others: Sequence[NamedPoint], point: NamedPoint) -> bool:
    """Whether another point with the same text lies so near that one label serves both."""
    (x, y), text = point
    return any(text == other and math.hypot(x - a, y - b) < 8 for (a, b), other in others)


def text_width(text: str) -> int:
    """Rough width in the chart's units; ideographs are twice as wide as letters."""
    return sum(13 if unicodedata.east_asian_width(char) in "WF" else 7 for char in text)


def _along(line: Sequence[Point]) -> Iterator[Point]:
    """Points on a line about three units apart."""
    for (x0, y0), (x1, y1) in pairwise(line):
        count = max(1, min(200, int(math.hypot(x1 - x0, y1 - y0) / 3)))
        yield from ((x0 + (x1 - x0) * at / count, y0 + (y1 - y0) * at / count) for at in range(count))


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _within(point: Point, box: Box) -> bool:
    return box[0] - 3 < point[0] < box[2] + 3 and box[1] - 3 < point[1] < box[3] + 3
