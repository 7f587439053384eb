from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trimtab.evaluation import Report, render_html, render_markdown
from trimtab.evaluation.blocks import Cell, Table, as_cell
from trimtab.evaluation.domain_pairs import cleaning_table, difficulty_histogram, hardest_pairs

number = st.one_of(st.floats(), st.floats(0, 1), st.integers(-3, 3).map(float))


def pair(now: float | None = 0.9, **changes: Any) -> dict[str, Any]:
    given = {
        "image": "photos/milk_003.jpg", "caption": "oat milk", "prefers": "soy milk", "before": 0.95, "now": now,
        "drawn": 7, "file": "train.csv", "row": 12,
    }  # fmt: skip
    return given | changes


def table_of(pairs: list[dict[str, Any]], **options: Any) -> Table:
    group = hardest_pairs(pairs, **options)
    assert group is not None
    (table,) = group.blocks
    assert isinstance(table, Table)
    return table


def test_the_histogram_has_round_bins_and_medians() -> None:
    histogram = difficulty_histogram([0.05, 0.5, 0.98], [0.01, 0.02, 0.99], bins=10, note="Rank of the partner.")
    assert list(histogram.edges) == pytest.approx([at / 10 for at in range(11)])
    assert histogram.counts == [[1, 0, 0, 0, 0, 1, 0, 0, 0, 1], [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]]
    assert list(histogram.marks) == [0.5, 0.02]
    assert histogram.note == (
        "Rank of the partner.\n\n67% of the pairs became easier, 33% harder. Dashed lines are medians."
    )


def test_pairs_that_were_not_measured_are_told() -> None:
    histogram = difficulty_histogram([0.1, 0.2, math.nan], [0.1, math.inf, 0.3])
    assert [sum(counts) for counts in histogram.counts] == [2, 2]
    assert "0% of the pairs became easier, 0% harder" in histogram.note
    assert "2 pairs were not measured both times" in histogram.note
    with pytest.raises(ValueError, match="no pair has a difficulty"):
        difficulty_histogram([math.nan], [math.nan])
    with pytest.raises(ValueError):
        difficulty_histogram([0.1, 0.2], [0.1])


@settings(deadline=None)
@given(st.lists(st.tuples(number, number), min_size=1, max_size=30), st.integers(2, 40))
def test_every_finite_value_is_in_a_bin(values: list[tuple[float, float]], bins: int) -> None:
    pairs = np.array(values)
    usable = np.abs(pairs) < 1e100
    if not usable.any():
        return
    histogram = difficulty_histogram(pairs[:, 0], pairs[:, 1], bins=bins)
    assert [sum(counts) for counts in histogram.counts] == usable.sum(axis=0).tolist()
    assert len(histogram.edges) <= max(bins, 5) + 4


def test_hardest_first_with_pictures_and_where_they_stand() -> None:
    table = table_of([pair(0.2), pair(0.99, drawn=3, before=0.6), pair(0.5, before=0.5, drawn=0)], scale=1.0)
    assert [as_cell(row.cells[4]).value for row in table.rows] == [0.99, 0.5, 0.2]
    first = [as_cell(cell) for cell in table.rows[0].cells]
    assert (first[0].value, first[0].picture) == ("milk_003.jpg", "photos/milk_003.jpg")
    assert [cell.value for cell in first[1:4]] == ["oat milk", "soy milk", 0.6]
    assert first[4] == Cell(0.99, "no easier", "caution")
    assert [cell.value for cell in first[5:]] == [3, "train.csv, row 12"]
    assert as_cell(table.rows[1].cells[4]).note == ""  # it was never drawn
    assert as_cell(table.rows[2].cells[4]).note == ""
    assert (table.columns[3].group, table.columns[3].digits, table.columns[3].meter) == ("Difficulty", 2, 1.0)


def test_what_is_missing_does_not_break_the_table() -> None:
    told = [
        pair(math.nan, row=None, prefers="", file="photos/Milk"),
        pair(None, before=None, caption="long " * 100),
        pair(0.1, before=math.nan, image=Image.new("RGB", (4, 4))),
    ]
    table = table_of(told)
    assert as_cell(table.rows[0].cells[0]).value == "picture in memory"
    unmeasured = [as_cell(cell).value for cell in table.rows[1].cells]
    assert (unmeasured[2], unmeasured[6]) == ("nothing else", "photos/Milk")
    assert len(str(as_cell(table.rows[2].cells[1]).value)) <= 161
    assert all(as_cell(row.cells[4]).note == "" for row in table.rows)
    assert hardest_pairs([]) is None
    assert len(table_of([pair(at / 100) for at in range(50)], limit=10).rows) == 10


def test_cleaning_by_split() -> None:
    table = cleaning_table({"train": {"kept": 90, "empty_caption": 4, "equal": 0, "duplicate": 6}, "val": {"kept": 7}})
    assert [[as_cell(cell).value for cell in row.cells] for row in table.rows] == [
        ["read", 100, 7], ["dropped: empty caption", 4, 0], ["dropped: duplicate", 6, 0], ["kept", 90, 7],
    ]  # fmt: skip
    assert [as_cell(cell).note for cell in table.rows[-1].cells[1:]] == ["90.0%", "100.0%"]
    assert as_cell(cleaning_table({"train": {}}).rows[-1].cells[1]).value == 0


def test_all_of_it_renders(tmp_path: Path) -> None:
    picture = tmp_path / "milk.png"
    Image.new("RGB", (30, 60), "white").save(picture)
    hardest = hardest_pairs([pair(image=picture, caption="<b>oat|milk"), pair(0.1, image=tmp_path / "gone.png")])
    assert hardest is not None
    sections = [difficulty_histogram([0.1], [0.2], title="Difficulty"), hardest, cleaning_table({"train": {"kept": 1}})]
    report = Report("t", sections=sections)
    html, markdown = render_html(report), render_markdown(report)
    assert html.count("data:image/jpeg;base64,") == 1
    assert "no such file</span>" in html
    assert str(tmp_path) not in html
    assert "<b>" not in html.split("</header>")[1].replace("<b>0.", "")
    assert "| milk.png | &lt;b&gt;oat\\|milk | soy milk | 0.95 | 0.90 | 7 | train.csv, row 12 |" in markdown
    assert "Look here for wrong labels" in markdown
