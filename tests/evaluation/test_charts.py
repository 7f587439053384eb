from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.evaluation.blocks import BarPanel, Bars, Histogram, LinePanel, Series, format_compact, format_value
from trimtab.evaluation.charts import (
    MAX_POINTS,
    WIDTH,
    bars_svg,
    histogram_svg,
    lines_svg,
    marker,
    smoothed,
    swatch,
    thin,
    ticks,
)
from trimtab.evaluation.labels import label_places, text_width

finite = st.floats(-1e9, 1e9, allow_subnormal=False)


@settings(deadline=None)
@given(finite, st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    if span > 1e-9 * max(abs(low), abs(high)):
        assert len(found) <= 7
        assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 6, [0, 2, 4, 6]),
        (0.1, 0.35, [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]),
    ],
)
def test_ticks_by_example(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_log_axis_names_the_few_sizes_that_were_measured() -> None:
    panel = LinePanel([Series("a", [1, 4, 16], [50.0, 60.0, 70.0])], "t", "pictures per class", "%", log_x=True)
    named = re.findall(r'class="tick x"[^>]*>([^<]+)<', lines_svg(panel))
    assert named == ["1", "4", "16"]


def test_log_ticks() -> None:
    assert ticks(0.5, 2000, log=True) == [1, 10, 100, 1000]
    assert ticks(0.1, 6, log=True) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])
    assert len(ticks(1e-12, 1e12, log=True)) <= 6
    assert len(ticks(3.1, 3.9, log=True)) >= 2


def numbers(svg: str, attribute: str) -> list[float]:
    return [float(value) for value in re.findall(rf' {attribute}="(-?[\d.]+)"', svg)]


def test_bars_have_lengths_in_proportion_and_stay_inside() -> None:
    panel = BarPanel(["R@1", "R@5"], [[50.0, 100.0], [None, 250.0]])
    svg = bars_svg(Bars(["a", "b"], [panel], maximum=100, unit="%"), panel)
    lengths = [float(x) for x in re.findall(r'class="fill c\d" x="[\d.]+" y="[\d.]+" width="([\d.]+)"', svg)]
    room = numbers(svg, "width")[0]
    assert lengths == pytest.approx([room / 2, 0, room, room])
    assert "b, R@1: not available" in svg
    assert "a, R@5: 100.0%" in svg


def test_long_group_names_are_shortened_but_told() -> None:
    panel = BarPanel(["Oxford Flowers 102, base classes"], [[1.0]])
    svg = bars_svg(Bars(["a"], [panel]), panel)
    assert "<title>Oxford Flowers 102, base classes</title>Oxford" in svg
    assert "…</text>" in svg


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-10, 1e6), st.one_of(st.floats(), finite)), max_size=20), st.booleans(), st.booleans()
)
def test_lines_stay_inside_whatever_was_recorded(points: list[tuple[float, float]], log_x: bool, log_y: bool) -> None:
    points = [(x, y if abs(y) < 1e200 else math.inf) for x, y in sorted(points, key=lambda p: p[0])]
    series = Series("loss", [x for x, _ in points], [y for _, y in points])
    svg = lines_svg(LinePanel([series], "t", "step", "loss", log_x=log_x, log_y=log_y, smooth=3))
    assert "nan" not in svg
    assert "inf" not in svg
    height = float(re.search(r'viewBox="0 0 400 (\d+)"', svg)[1])  # type: ignore[index]
    for path in re.findall(r' d="([^"]*)"', svg):
        coordinates = [float(number) for number in re.findall(r"-?[\d.]+", path)]
        assert all(-1 <= x <= WIDTH + 1 for x in coordinates[::2])
        assert all(-1 <= y <= height + 1 for y in coordinates[1::2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(finite, st.one_of(st.floats(), finite)), max_size=12))
def test_labelled_points_stay_inside(points: list[tuple[float, float]]) -> None:
    series = Series("a", [x for x, _ in points], [y for _, y in points], [f"{at / 4:g}" for at in range(len(points))])
    svg = lines_svg(LinePanel([series], "t", "general", "domain", tall=True))
    assert "nan" not in svg
    height = float(re.search(r'viewBox="0 0 400 (\d+)"', svg)[1])  # type: ignore[index]
    drawn = re.findall(r'<text class="label c1" x="([\d.]+)" y="([\d.]+)"', svg)
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= height for x, y in drawn)
    shown = sum(abs(y) < 1e100 for _, y in points)
    assert svg.count('class="point c1"') == shown
    assert len(drawn) <= shown


def test_labels_speak_and_share_a_point() -> None:
    full = Series("full", [50.0, 30.0], [10.0, 70.0], ["base", "1"], color=4)
    adapter = Series("adapter", [50.0, 45.0], [10.0, 72.0], ["base", "1"], color=1)
    svg = lines_svg(LinePanel([full, adapter], "Curve", "general", "domain"))
    assert svg.count(">base</text>") == 1
    assert '<text class="label" ' in svg  # the shared one has no line's colour
    assert svg.count('<text class="label c') == 2
    assert "full: base (50, 10), 1 (30, 70); adapter: base (50, 10), 1 (45, 72)" in svg
    assert "adapter, 1: general 45, domain 72" in svg


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300), st.text("0.12", min_size=1, max_size=4)), max_size=15))
def test_labels_never_lie_on_each_other(points: list[tuple[float, float, str]]) -> None:
    named = [((x, y), text) for x, y, text in points]
    places = label_places(named, [[place for place, _ in named]], (0.0, 0.0, 400.0, 300.0))
    assert len(places) == len(named)
    boxes = [
        (place[0] - text_width(text) / 2, place[1] - 6.5, place[0] + text_width(text) / 2, place[1] + 6.5)
        for place, (_, text) in zip(places, named)
        if place is not None
    ]
    for at, box in enumerate(boxes):
        assert box[0] >= 0
        assert box[2] <= 400
        for other in boxes[:at]:
            assert box[0] >= other[2] or other[0] >= box[2] or box[1] >= other[3] or other[1] >= box[3]


def test_every_color_has_its_own_mark() -> None:
    assert len({marker(color).replace(f"c{color}", "") for color in range(6)}) == 6


def test_lines_are_told_apart_without_colors() -> None:
    few = [Series(name, [1.0, 2.0, 4.0], [1.0, 2.0, 3.0], spread=[0.0, 0.5, 0.5]) for name in ("a", "b")]
    panel = LinePanel(few, "t", "shots", "%")
    svg = lines_svg(panel)
    assert svg.count('<circle class="point c1"') == svg.count('<polygon class="point c2"') == 3
    assert "dashed" not in svg
    assert "<title>b, shots 2: 2 ± 0.5</title>" in svg
    assert svg.count('class="whisker c2"') == 2
    assert [marker(number) in swatch(panel, number - 1) for number in (1, 2)] == [True, True]
    many = [Series(name, list(range(40)), list(range(40))) for name in ("a", "b")]
    panel = LinePanel(many, "t", "step", "loss")
    assert re.findall(r'class="line (c\d dashed)"', lines_svg(panel)) == ["c1 dashed", "c2 dashed"]
    assert 'class="line c2 dashed"' in swatch(panel, 1)
    alone = LinePanel(many[:1], "t", "step", "loss")
    assert "dashed" not in lines_svg(alone)
    assert swatch(alone, 0) == '<i class="c1"></i>'


def test_a_series_may_have_its_own_color() -> None:
    svg = lines_svg(LinePanel([Series("a", [1, 2], [1, 2], color=4), Series("b", [1, 2], [2, 1])]))
    assert re.findall(r'class="line (c\d)"', svg) == ["c4", "c2"]


def test_histogram_layers_have_heights_in_proportion() -> None:
    histogram = Histogram(["base", "now"], [0, 1, 2, 4], [[1, 1, 2], [10, 0, 0]], "Difficulty", marks=[1.5, 9.0])
    svg = histogram_svg(histogram)
    areas = re.findall(r'class="area (c\d)" d="([^"]*)"', svg)
    assert [color for color, _ in areas] == ["c0", "c1"]
    base, now = ([float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", path)] for _, path in areas)
    ground = base[0]
    assert (ground - base[5]) / (ground - now[1]) == pytest.approx(0.5, abs=0.01)  # 50% beside 100%
    assert svg.count("mark own") == 1  # the other lies outside
    assert "1 to 2: base 25.0%, now 0.0%" in svg
    assert "Difficulty. base: median 1.5, most from 2 to 4 (50%); now: median 9, most from 0 to 1 (100%)" in svg
    assert "nothing was recorded" in histogram_svg(Histogram(["a"], [0, 1], [[0]]))


def test_a_gap_where_there_is_no_value() -> None:
    svg = lines_svg(LinePanel([Series("loss", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 2.0, 1.0])], "t"))
    path = re.findall(r' d="([^"]*)"', svg)[0]
    assert path.count("M") == 2
    assert "nothing was recorded" in lines_svg(LinePanel([Series("a", [], [])], "t"))


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[7777] = (7777.0, 99.0)
    kept = thin(points, MAX_POINTS)
    assert len(kept) <= MAX_POINTS + 2
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (7777.0, 99.0) in kept
    assert kept == sorted(kept)
    assert thin(points[:10], MAX_POINTS) == points[:10]


def test_smoothing() -> None:
    assert smoothed([(0, 0), (1, 3), (2, 6), (3, 0)], 3) == [(0, 1.5), (1, 3), (2, 3), (3, 3)]
    assert math.isnan(smoothed([(0, 1), (1, math.nan), (2, 1)], 3)[1][1])


def test_figures_as_text() -> None:
    assert [format_value(v) for v in (None, math.nan, 3.14159, 12345, "x", True)] == [
        "–", "–", "3.1", "12,345", "x", "yes",
    ]  # fmt: skip
    assert [format_compact(v) for v in (0, 0.5, 1500, 2e6, -3e9, 0.0005, 6.93e-9)] == [
        "0", "0.5", "1.5k", "2M", "-3G", "5e-4", "6.9e-9",
    ]  # fmt: skip
