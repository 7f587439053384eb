from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from tiny_pairs import picture_bytes, save_pictures, write_shard, write_table
from trimtab.config import LabelSource
from trimtab.data.labelled import load_labelled
from trimtab.errors import DataError


def table(folder: Path, labels: list[Any], name: str = "items.csv") -> list[LabelSource]:
    save_pictures(folder, [f"{at}.png" for at in range(len(labels))])
    rows = [(f"{at}.png", label) for at, label in enumerate(labels)]
    return [LabelSource(str(write_table(folder / name, rows, columns=("image", "label"))))]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_every_format(tmp_path: Path, suffix: str) -> None:
    found = load_labelled(table(tmp_path, ["red pear", "apple", "red pear"], f"items{suffix}"))
    assert found.classes == ("apple", "red pear")
    assert found.labels.tolist() == [1, 0, 1]
    assert [image.name for image in found.images] == ["0.png", "1.png", "2.png"]
    assert found.counts.tolist() == [1, 2]


def test_class_folders_and_shards(tmp_path: Path) -> None:
    save_pictures(tmp_path / "folder", ["fruit/green-apple/1.png", "fruit/pear/2.png"])
    found = load_labelled([LabelSource(str(tmp_path / "folder"))])
    assert (found.classes, found.labels.tolist()) == (("green apple", "pear"), [0, 1])
    members = {
        "0.png": picture_bytes(1),
        "0.json": '{"label": "pear"}',
        "1.png": picture_bytes(2),
        "1.json": '{"label": "fig"}',
    }
    write_shard(tmp_path / "some.tar", members)
    assert load_labelled([LabelSource(str(tmp_path / "some.tar"))]).classes == ("fig", "pear")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_cells_that_data_frames_leave_empty_are_no_labels(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="row 2: the picture has no label"):
        load_labelled(table(tmp_path, [1.0, math.nan, 0.0], f"items{suffix}"))
    assert load_labelled(table(tmp_path, [1.0, 0.0], f"items{suffix}")).classes == ("0", "1")


def test_folder_names_match_lists_and_tables_however_they_are_written(tmp_path: Path) -> None:
    save_pictures(tmp_path / "folder", ["T-shirt/1.png", "long_sleeve/2.png", "Socks/3.png"])
    folder = [LabelSource(str(tmp_path / "folder"))]
    classes = ["long_sleeve", "socks", "T-shirt"]
    listed = load_labelled(folder, classes)
    assert (listed.classes, listed.labels.tolist()) == (tuple(classes), [1, 2, 0])
    alone = load_labelled(folder)
    assert alone.classes == ("Socks", "T shirt", "long sleeve")
    rows = table(tmp_path, ["T-shirt", "long_sleeve"])
    validation = load_labelled(rows, alone.classes, every_class=False)
    assert validation.labels.tolist() == [1, 2]
    together = load_labelled([*folder, *rows])
    assert together.classes == ("Socks", "T-shirt", "long_sleeve")
    assert together.labels.tolist() == [0, 1, 2, 1, 2]


def test_folders_of_a_mac_match_lists(tmp_path: Path) -> None:
    save_pictures(tmp_path / "folder", ["A\u0308pfel/1.png", "Birnen/2.png"])
    (tmp_path / "classes.txt").write_text("Birnen\nÄpfel\n", encoding="utf-8")
    found = load_labelled([LabelSource(str(tmp_path / "folder"))], tmp_path / "classes.txt")
    assert (found.classes, found.labels.tolist()) == (("Birnen", "Äpfel"), [1, 0])
    assert all(image.exists() for image in found.images)


def test_names_that_several_classes_could_mean_match_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'T shirt' \(.*row 2; 1 pictures, do you mean"):
        load_labelled(table(tmp_path, ["T shirt"]), ["T-shirt", "t_shirt"])
    with pytest.raises(DataError, match=r"'-1' \(.*row 3; 1 pictures"):
        load_labelled(table(tmp_path, ["1", "-1"]), ["0", "1"])
    with pytest.raises(DataError, match="not among the 2 classes of training: 'fig'"):  # not of the table itself
        load_labelled(table(tmp_path, ["apple", "fig"]), ("apple", "pear"), every_class=False)
    assert load_labelled(table(tmp_path, ["red-apple", "red_apple"])).classes == ("red-apple", "red_apple")


def test_pictures_in_no_class_folder_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_pictures(tmp_path, ["top.png", "fig/1.png", "pear/2.png"])
    with caplog.at_level(logging.WARNING):
        found = load_labelled([LabelSource(str(tmp_path))])
    assert (found.classes, len(found)) == (("fig", "pear"), 2)
    assert [one.reason for one in found.dropped] == [f"{tmp_path.resolve()}/top.png: lies in no class folder"]
    assert "1 of 3 pictures cannot be used" in caplog.text
    rows = write_table(tmp_path / "t.jsonl", [(None, None)], ("image", "label"))
    with pytest.raises(DataError, match=r"1 of 1 pictures cannot be used.*row 1: the column 'image' is empty"):
        load_labelled([LabelSource(str(rows))])


def test_a_file_gives_classes_and_their_order(tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("pear\napple\n")
    found = load_labelled(table(tmp_path, ["apple", "pear"]), names)
    assert (found.classes, found.labels.tolist()) == (("pear", "apple"), [1, 0])


def test_numbers_stand_for_the_classes_of_the_file(tmp_path: Path) -> None:
    assert load_labelled(table(tmp_path, [0, 2, 1]), ["pear", "apple", "fig"]).labels.tolist() == [0, 2, 1]


def test_numbers_are_names_without_a_file_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_labelled(table(tmp_path, [0, 1]), ["pear", "apple"])
        load_labelled(table(tmp_path, ["7", "fig"]))
        assert not caplog.records
        assert load_labelled(table(tmp_path, [10, 2])).classes == ("10", "2")
    assert len(caplog.records) == 1
    assert "all labels are numbers, 10, 2, and are taken as the names" in caplog.text
    assert "data.classes" in caplog.text


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([1, 2, 3], ["pear", "apple", "fig"], r"row 4: label 3, but .* 0 to 2; .* from 1 to 3: they are off by one"),
        ([0, 7], ["pear", "apple"], r"label 7, .* mend the labels, or add the classes"),
        (["pear", "aple", "aple"], ["pear", "apple"], r"'aple' \(.*csv, row 3; 2 pictures, do you mean 'apple'\?\)"),
        (["pear", 1], ["pear", "apple"], r"'1' \(.*row 3"),
        ([1, 2, 0], ["1", "2", "3"], r"'0' \(.*row 4"),  # names, so none is a number
        (["pear", "pear"], ["pear", "apple", "fig"], r"2 of 3 classes have no picture: apple, fig\. Add pictures"),
        (["pear", "pear"], None, r"only the class 'pear', and telling classes apart takes two"),
        (["pear", " "], None, r"row 3: the picture has no label"),
        (["pear", "apple"], ["pear", "apple", " pear"], r"classes 1 and 3 of 3 have the same name 'pear'"),
        (["pear", "apple"], ["pear"], r"only the class 'pear'"),
    ],
)  # fmt: skip
def test_bad_labels(tmp_path: Path, labels: list[Any], classes: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_labelled(table(tmp_path, labels), classes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pear\n\napple\n", "line 2 is blank"),
        ("pear\napple\npear\n", r"'pear' stands on line 1 and on line 3"),
        ("", "is empty"),
    ],
)
def test_bad_class_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load_labelled(table(tmp_path, ["pear", "apple"]), tmp_path / "classes.txt")


def test_a_picture_has_one_class(tmp_path: Path) -> None:
    save_pictures(tmp_path, ["0.png", "1.png"])
    rows = [("0.png", "pear"), ("1.png", "apple"), ("0.png", "apple"), ("1.png", "apple")]
    source = LabelSource(str(write_table(tmp_path / "items.csv", rows, columns=("image", "label"))))
    with pytest.raises(DataError, match=r"row 4: .*0\.png is of class 'apple' here and 'pear' in .*row 2"):
        load_labelled([source])


def test_unusable_pictures_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = table(tmp_path, ["pear", "apple", "pear", "apple", "pear", "pear"])
    (tmp_path / "0.png").unlink()
    (tmp_path / "4.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        found = load_labelled(sources)
    assert (len(found), found.counts.tolist()) == (4, [2, 2])
    assert [one.row for one in found.dropped] == [2, 6]
    assert "2 of 6 pictures cannot be used" in caplog.text
    for number in (1, 2):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(DataError, match=r"4 of 6 pictures cannot be used.* More than half is too much"):
        load_labelled(sources)


def test_validation_may_lack_classes(tmp_path: Path) -> None:
    found = load_labelled(table(tmp_path, ["pear"]), ["apple", "pear"], every_class=False)
    assert found.counts.tolist() == [0, 1]


def test_labels_and_class_names_are_part_of_the_digest(tmp_path: Path) -> None:
    found = [load_labelled(table(tmp_path, labels)).digest for labels in ("aba", "bab", "aca", "aba")]
    assert len(set(found)) == 3
    assert found[0] == found[3]


def test_half_of_the_pictures_may_be_unusable(tmp_path: Path) -> None:
    sources = table(tmp_path, ["pear", "apple", "pear", "apple"])
    for number in (0, 1):
        (tmp_path / f"{number}.png").unlink()
    assert len(load_labelled(sources)) == 2
