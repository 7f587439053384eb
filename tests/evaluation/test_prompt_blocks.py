"""What the report shows of prompts: maps over pictures, words, confusions, mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trimtab.evaluation.blocks import Cell
from trimtab.evaluation.markdown import block_markdown
from trimtab.evaluation.page import block_html
from trimtab.evaluation.prompt_blocks import (
    Looked,
    NearWords,
    attention_maps,
    confident_mistakes,
    confusion_matrix,
    lit,
    nearest_words,
)

WHITE = Image.new("RGB", (64, 64), (255, 255, 255))


def test_a_patch_that_is_looked_at_stays_bright_and_the_others_turn_dark() -> None:
    weights = np.zeros(16)
    weights[5] = 1.0  # second row, second column
    pixels = np.asarray(lit(WHITE, weights).convert("L"), float)
    assert pixels[24, 24] > 220
    assert pixels[56, 56] < 100


def test_a_cls_token_in_front_is_not_shown() -> None:
    weights = np.concatenate([[100.0], np.arange(16.0)])
    assert np.array_equal(np.asarray(lit(WHITE, weights)), np.asarray(lit(WHITE, np.arange(16.0))))


def test_even_attention_shows_the_picture_as_it_is() -> None:
    assert np.array_equal(np.asarray(lit(WHITE, np.full(9, 1 / 9))), np.asarray(WHITE))


def test_patches_that_make_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="8 patches make no square"):
        lit(WHITE, np.ones(8))


def test_maps_have_the_picture_and_one_image_per_query() -> None:
    grid = attention_maps([Looked(WHITE, np.ones((3, 16)), "a cat", True)])
    (query,) = grid.queries
    assert [image.caption for image in query.images] == ["a cat", "query 1", "query 2", "query 3"]
    assert "data:image/" in block_html(grid, {})


def test_maps_without_any_difference_say_so() -> None:
    even = Looked(WHITE, np.full((2, 16), 1 / 16), "a cat", True)
    uneven = Looked(WHITE, np.eye(2, 16), "a dog", True)
    assert attention_maps([even], note="Bright is near.").note.startswith("Bright is near. Here all patches")
    assert "alike" not in attention_maps([even, uneven], note="Bright is near.").note


def test_words_tell_where_a_token_started() -> None:
    table = nearest_words([NearWords("photo", 0.5, [("photo", 0.9), ("<b>", 0.1)]), NearWords("", 1.0, [])])
    text = block_markdown(table)
    assert "started as 'photo'" in text
    assert "photo (0.90)" in text
    assert "started at random" in text
    assert "<b>" not in block_html(table, {})


def test_the_matrix_counts_every_picture_once() -> None:
    labels, taken = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    table = confusion_matrix(labels, taken, ["cat", "dog"])
    values = [[cell.value if isinstance(cell, Cell) else cell for cell in row.cells] for row in table.rows]
    assert values == [["cat", 1, 1, None], ["dog", 1, 2, None]]


def test_of_many_classes_those_are_shown_that_are_mistaken_most() -> None:
    names = [f"class {at}" for at in range(30)]
    labels = np.array([29, 29, 29, *range(30)])
    taken = np.array([28, 28, 3, *range(30)])
    table = confusion_matrix(labels, taken, names)
    assert len(table.rows) == 12
    assert "Of 30 classes the 12" in table.note
    shown = [row.cells[0] for row in table.rows]
    assert {"class 3", "class 28", "class 29"} <= set(shown)
    total = sum(
        value
        for row in table.rows
        for cell in row.cells[1:]
        if isinstance(value := cell.value if isinstance(cell, Cell) else cell, int)
    )
    assert total == 12 + 3


def test_mistakes_come_with_the_surest_first() -> None:
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    table = confident_mistakes([WHITE] * 3, np.array([1, 1, 1]), scores, ["cat", "dog"], limit=5)
    assert [row.cells[3] for row in table.rows] == pytest.approx([90.0, 60.0])
    assert [row.cells[1:3] for row in table.rows] == [["dog", "cat"]] * 2
    assert table.rows[0].cells[0] == Cell("picture in memory", "a picture of dog")


def test_mistakes_name_their_files() -> None:
    table = confident_mistakes([Path("shop/7.png")], np.array([1]), np.array([[0.9, 0.1]]), ["cat", "dog"])
    assert "| 7.png (a picture of dog) |" in block_markdown(table)
