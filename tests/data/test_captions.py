"""Sources of pairs: tables, class folders, shards, and what is refused in each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
from math import inf, nan
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_pairs import picture_bytes, save_pictures, write_shard, write_table
from trimtab.config import PairSource
from trimtab.data.captions import Entry, read_cells, read_entries, split_sentences
from trimtab.data.pairs import PairCounts, load_pairs
from trimtab.data.shards import NOT_UTF8, PictureFile
from trimtab.errors import DataError, RecipeError

ROWS = [("a.png", "a dog"), ("sub/b.png", "一只猫"), ("a.png", "the dog")]


def shown(entries: list[Entry]) -> list[tuple[str, tuple[str, ...], int]]:
    """Names (or reasons), texts and rows."""
    return [
        (entry.picture if isinstance(entry.picture, str) else entry.picture.name, tuple(entry.texts), entry.row)
        for entry in entries
    ]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table(suffix: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / f"t{suffix}", ROWS)
    first = 2 if suffix in (".csv", ".tsv") else 1
    expected = [(name, (text,), first + i) for i, (name, text) in enumerate(ROWS)]
    assert shown(read_entries(PairSource(str(table)))) == expected
    write_table(table, ROWS, ("file", "caption"))
    entries = read_entries(PairSource(str(table), image="file", text="caption"))
    assert shown(entries) == expected
    assert {entry.file for entry in entries} == {str(table)}
    assert isinstance(entries[0].picture, PictureFile)
    assert entries[0].picture.path == tmp_path.resolve() / "a.png"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_lists_and_nulls(suffix: str, tmp_path: Path) -> None:
    rows = [("a.png", ["a dog", "the dog"]), ("b.png", []), ("c.png", None), (None, ["a cat", None])]
    entries = read_entries(PairSource(str(write_table(tmp_path / f"t{suffix}", rows))))
    assert shown(entries) == [
        ("a.png", ("a dog", "the dog"), 1),
        ("b.png", (), 2),
        ("c.png", (), 3),
        ("the column 'image' is empty", ("a cat", ""), 4),
    ]


def test_nothing_but_a_line_feed_ends_a_record_of_jsonl(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"image": "a.png", "text": "a\u2028dog"}\n{"image": "b.png", "text": "a cat"}', encoding="utf-8")
    assert shown(read_entries(PairSource(str(table)))) == [("a.png", ("a\u2028dog",), 1), ("b.png", ("a cat",), 2)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_nan_is_no_text_and_whole_floats_are_whole(suffix: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / f"t{suffix}", [("a.png", nan), ("b.png", 1.0)], ("image", "label"))
    assert shown(read_entries(PairSource(str(table), label="label", templates=("{}",)))) == [
        ("a.png", (), 1),
        ("b.png", ("1",), 2),
    ]
    write_table(table, [("a.png", [0.5, nan])])
    assert shown(read_entries(PairSource(str(table)))) == [("a.png", ("0.5", ""), 1)]
    write_table(table, [("a.png", inf)])
    with pytest.raises(DataError, match="row 1: 'text' is infinite"):
        read_entries(PairSource(str(table)))


def test_jsonl_keys_may_be_missing_in_some_rows_not_in_all(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"image": "a.png"}\n\n{"image": "b.png", "text": 7}\n', encoding="utf-8")
    assert shown(read_entries(PairSource(str(table)))) == [("a.png", (), 1), ("b.png", ("7",), 3)]
    table.write_text('{"image": "a.png"}\n{"image": "b.png", "caption": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no column 'text'; columns found: image, caption; a source names its columns"):
        read_entries(PairSource(str(table)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "image,label\na.png,dog\n", "no column 'text'; columns found: image, label; a source names its"),
        ("t.csv", "image,text\na.png\n", r"t\.csv, row 2: has 1 fields"),
        ("t.csv", "image,text\n", "has no rows"),
        ("t.csv", "image,text\na.png,\0\n", "NUL byte on line 2"),
        ("t.csv", "image,text\n../a.png,dog\n", r"t\.csv, row 2: .*outside the data folder.*as the root of this"),
        ("t.csv", "image,text\n/etc/a.png,dog\n", "row 2: .*outside the data folder"),
        ("t.csv", "image,text\nhttps://example.org/a.png,dog\n", "row 2: .* is an address"),
        ("t.csv", "image,text\nfile:///etc/a.png,dog\n", "row 2: .* is an address"),
        ("t.jsonl", '{"image": "a.png", "text": {"en": "x"}}\n', "row 1: 'text' holds a dict"),
        ("t.jsonl", '{"image": "a.png", "text": [["x"]]}\n', "row 1: 'text' holds a list, not a text or a list"),
        ("t.jsonl", '{"image": ["a.png", "b.png"], "text": "x"}\n', "row 1: 'image' holds a list: give one picture"),
        ("t.jsonl", '{"image": "a.png", "text": true}\n', "row 1: 'text' holds a bool"),
        ("t.jsonl", '{"image": "a\\ud800.png", "text": "x"}\n', "row 1: image path .* cannot be followed"),
        ("t.jsonl", '["a.png", "x"]\n', "row 1: is not an object"),
        ("t.jsonl", '{"image": "a.png"\n', "row 1: is not JSON"),
        ("t.parquet", "PAR1 not really", r"t\.parquet: is not a readable Parquet file"),
        ("t.parquet", "", r"t\.parquet: is not a readable Parquet file"),
        ("t.txt", "image,text\n", r"t\.txt: pairs come from a table \(\.csv, .*and this is none of these"),
        ("t.tar.gz", "x", "uncompressed shards"),
        ("t.tar", "x", r"t\.tar: is not an uncompressed tar file"),
    ],
    ids=lambda value: ascii(value[:30]),
)
def test_bad_sources_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_entries(PairSource(str(path)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.csv", "no such file"),
        ("none.jsonl", "no such file"),
        ("none.parquet", "no such file"),
        ("none.tar", "no such file"),
        ("none", "and this does not exist"),
        ("https://example.org/train.csv", "is an address or a command"),
        ("pipe:cat x.tar", "is an address or a command"),
    ],
)
def test_sources_that_are_not_there(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_entries(PairSource(path))


def test_columns_of_parquet_are_named(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [("a.png", "x")], ("picture", "text"))
    with pytest.raises(DataError, match=r"no column 'image'; columns found: picture, text; a source names its"):
        read_entries(PairSource(str(table)))
    pq.write_table(pa.table([["a.png"], ["x"], ["y"]], names=["image", "text", "text"]), table)
    with pytest.raises(DataError, match="'text' stands in the header 2 times"):
        read_entries(PairSource(str(table)))


def test_the_root_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    table = write_table(tmp_path / "t.csv", ROWS)
    entries = read_entries(PairSource(str(table), root=str(tmp_path / "pictures")))
    assert entries[1].picture == PictureFile((tmp_path / "pictures/sub/b.png").resolve(), "sub/b.png")
    with pytest.raises(DataError, match=r"root .*nowhere: no such folder"):
        read_entries(PairSource(str(table), root=str(tmp_path / "nowhere")))
    for path in (tmp_path / "pictures", tmp_path / "s.tar"):
        with pytest.raises(RecipeError, match=r"root=.* goes with a table"):
            read_entries(PairSource(str(path), root=str(tmp_path)))


def test_links_that_lead_out_of_the_root(tmp_path: Path) -> None:
    save_pictures(tmp_path, ["secret.png", "data/a.png"])
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    table = write_table(tmp_path / "data" / "t.csv", [("a.png", "x"), ("link.png", "y")])
    with pytest.raises(DataError, match=r"row 3: .* symbolic link that leads outside"):
        read_entries(PairSource(str(table)))
    assert len(read_entries(PairSource(str(table), root=str(tmp_path)))) == 2


def test_class_folders(tmp_path: Path) -> None:
    save_pictures(
        tmp_path,
        ["fire-truck/b.png", "fire-truck/a.JPG", "wild/Arctic_fox/c.webp", ".hidden.png", "top.png", ".trash/d.png"],
    )
    (tmp_path / "fire-truck" / "notes.txt").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    entries = read_entries(PairSource(str(tmp_path), templates=("a photo of a {}", "{}")))
    assert shown(entries) == [
        (f"{tmp_path.resolve()}/top.png: lies in no class folder", (), 1),
        ("fire-truck/a.JPG", ("a photo of a fire truck", "fire truck"), 2),
        ("fire-truck/b.png", ("a photo of a fire truck", "fire truck"), 3),
        ("wild/Arctic_fox/c.webp", ("a photo of a Arctic fox", "Arctic fox"), 4),
    ]


def test_pictures_of_a_phone_are_counted(tmp_path: Path) -> None:
    save_pictures(tmp_path, ["dog/a.png", "dog/b.avif", "cat/c.png", "cat/d.png"])
    (tmp_path / "cat" / "e.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert load_pairs([PairSource(str(tmp_path), templates=("{}",))]).counts == PairCounts(kept=4, unreadable=1)


def test_names_that_are_not_utf8_cost_their_own_pictures(tmp_path: Path) -> None:
    # As archives that were packed on other systems leave them.
    save_pictures(tmp_path, ["dog/a.png", "dog/b.png", "odd/c.png", "cat/d.png"])
    (tmp_path / "dog" / "b.png").rename(os.fsdecode(os.fsencode(tmp_path / "dog") + b"/\xb0\xc4.png"))
    (tmp_path / "odd").rename(os.fsdecode(os.fsencode(tmp_path) + b"/o\xc8"))
    entries = read_entries(PairSource(str(tmp_path), templates=("{}",)))
    assert [entry.texts for entry in entries] == [["cat"], [], ["dog"], []]
    assert [str(entry.picture).partition(": ")[2] for entry in entries if not entry.texts] == [NOT_UTF8] * 2
    str(entries).encode()
    sources = [PairSource(str(tmp_path), templates=("{}",))]
    assert load_pairs(sources).counts == PairCounts(kept=2, missing=2)
    for name in ("cat", "dog"):
        (tmp_path / name).rename(os.fsdecode(os.fsencode(tmp_path / name) + b"\xc8"))
    with pytest.raises(DataError, match=r"4 of 4 pairs cannot be used .* the name is not UTF-8: rename it"):
        load_pairs(sources)


def test_folders_that_may_not_be_meant_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = PairSource(str(tmp_path), templates=("{}",))
    save_pictures(tmp_path, ["cat/1.png", "animals/dog/1.png"])
    read_entries(source)
    assert not caplog.records
    (tmp_path / "bird").mkdir()
    (tmp_path / ".hidden").mkdir()
    save_pictures(tmp_path, ["cat/old/1.png"])
    assert {entry.texts[0] for entry in read_entries(source)} == {"cat", "dog", "old"}
    empty, within = (record.getMessage() for record in caplog.records)
    assert "1 folders hold no pictures and are no classes, 'bird' for one" in empty
    assert (
        f"1 folders within the folder of a class are classes of their own, {str(Path('cat/old'))!r} for one" in within
    )


def test_folders_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: holds no class folders with pictures$"):
        read_entries(PairSource(str(tmp_path / "none")))
    write_shard(tmp_path / "none" / "s-0.tar", {"a.txt": "x"})
    with pytest.raises(DataError, match=r"it holds shards: give a pattern such as .*s-0\.tar"):
        read_entries(PairSource(str(tmp_path / "none")))
    save_pictures(tmp_path / "twice", ["dog/images/a.png", "cat/images/b.png"])
    with pytest.raises(DataError, match="folders cat/images and dog/images both name the class 'images'"):
        read_entries(PairSource(str(tmp_path / "twice")))
    save_pictures(tmp_path / "merged", ["red-apple/a.png", "red_apple/b.png"])
    with pytest.raises(DataError, match="folders red-apple and red_apple both name the class 'red apple'"):
        read_entries(PairSource(str(tmp_path / "merged")))
    save_pictures(tmp_path / "flat", ["a.png"])
    with pytest.raises(DataError, match="flat: holds no class folders with pictures"):
        read_entries(PairSource(str(tmp_path / "flat")))
    save_pictures(tmp_path / "linked", ["dog/a.png"])
    (tmp_path / "linked" / "cat").symlink_to(tmp_path / "twice" / "cat")
    with pytest.raises(DataError, match="linked/cat: is a link to a folder"):
        read_entries(PairSource(str(tmp_path / "linked")))
    (tmp_path / "linked" / "cat").unlink()
    monkeypatch.setattr("os.scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied", str(path))))
    with pytest.raises(DataError, match=r"linked: cannot be read \(denied\)"):
        read_entries(PairSource(str(tmp_path / "linked")))
    monkeypatch.undo()
    (tmp_path / "linked" / "dog" / "b.png").symlink_to(tmp_path / "twice" / "cat" / "images" / "b.png")
    with pytest.raises(DataError, match=r"row 2: .*symbolic link that leads outside .* as the path of this source"):
        read_entries(PairSource(str(tmp_path / "linked")))


@pytest.mark.parametrize(
    ("names", "captions"),
    [
        (("banana", "T-shirt"), ["a photo of a banana", "a photo of a T-shirt"]),
        (("香蕉", "T恤"), ["一张香蕉的照片", "一张T恤的照片"]),
        (("банан", "кот"), ["банан", "кот"]),
    ],
)
def test_without_templates_names_have_one_that_goes_with_their_script(
    names: tuple[str, str], captions: list[str], tmp_path: Path
) -> None:
    rows = [(f"{number}.png", name) for number, name in enumerate(names)]
    table = write_table(tmp_path / "t.csv", rows, ("image", "label"))
    entries = read_entries(PairSource(str(table), label="label"))
    assert [list(entry.texts) for entry in entries] == [[caption] for caption in captions]


def test_labels_templates_and_descriptions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("a.png", "Golden-Delicious"), ("b.png", " milk "), ("c.png", ""), ("d.png", "{}")]
    table = write_table(tmp_path / "t.csv", rows, ("image", "label"))
    texts = write_table(
        tmp_path / "d.csv",
        [
            ("golden delicious", "A sweet apple. Good with approx. 2 spoons of sugar."),
            ("MILK", "White!  From cows?"),
            ("milk", "一种饮料。很白。"),
            ("bread", "Not in the data."),
        ],
        ("class", "description"),
    )
    source = PairSource(str(table), label="label", templates=("a {}",), descriptions=str(texts))
    with caplog.at_level(logging.WARNING):
        entries = read_entries(source)
    assert [tuple(entry.texts) for entry in entries] == [
        ("a Golden-Delicious", "A sweet apple.", "Good with approx. 2 spoons of sugar."),
        ("a milk", "White!", "From cows?", "一种饮料。", "很白。"),
        ("",),
        ("a {}",),
    ]
    assert "no description for 1 of 3 classes: '{}'" in caplog.text

    rows = [("milk", None), ("golden delicious", "Sweet.")]
    nulls = write_table(tmp_path / "d.jsonl", rows, ("class", "description"))
    described = read_entries(dataclasses.replace(source, descriptions=str(nulls)))
    assert [tuple(entry.texts) for entry in described[:2]] == [("a Golden-Delicious", "Sweet."), ("a milk",)]

    write_table(texts, [("bread", "x"), ("wine", "y")], ("class", "description"))
    with pytest.raises(DataError, match=r"describes none of the 3 classes of .*: it has 'bread', 'wine', and the"):
        read_entries(source)
    write_table(texts, [("bread", "x")], ("name", "description"))
    with pytest.raises(DataError, match="no column 'class'"):
        read_entries(source)


def test_descriptions_need_classes(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", ROWS)
    with pytest.raises(RecipeError, match=r"descriptions='d\.csv' needs class names"):
        read_entries(PairSource(str(table), descriptions="d.csv"))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("3.5 dl of milk, e.g. cold. Élan vital.", ["3.5 dl of milk, e.g. cold.", "Élan vital."]),
        ("很白。好喝！对吗？", ["很白。", "好喝！", "对吗？"]),
        ("Milch ca. über 1 l. Öl.", ["Milch ca. über 1 l.", "Öl."]),
        ("घोड़ा मैदान में है। वह भूरा है।", ["घोड़ा मैदान में है।", "वह भूरा है।"]),
        ("قطة سوداء؟ نعم. كلب أبيض.", ["قطة سوداء؟", "نعم.", "كلب أبيض."]),
        ("no end", ["no end"]),
        (" \n ", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_shards_as_sources(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "s-0.tar",
        {
            "0.png": picture_bytes(0),
            "0.json": '{"caption": ["a dog", "the dog"], "label": "dog"}',
            "1.png": picture_bytes(1),
            "1.txt": " a cat\n",
            "2.png": picture_bytes(2),
            "3.txt": "no picture",
            "4.png": picture_bytes(4),
            "4.json": '{"text": {"en": "x"}}',
            "5.png": picture_bytes(6),
            "5.json": '{"text": NaN, "caption": "a fox"}',
        },
    )
    cut = write_shard(tmp_path / "s-1.tar", {"0.png": picture_bytes(5), "0.json": '{"text": "x", "caption": "y"}'})
    cut.write_bytes(cut.read_bytes().rstrip(b"\0"))
    pattern = f"{tmp_path}/s-{{0..1}}.tar"
    entries = read_entries(PairSource(pattern))
    assert shown(entries) == [
        ("s-0.tar/0.png", ("a dog", "the dog"), 1),
        ("s-0.tar/1.png", (" a cat\n",), 2),
        ("s-0.tar/2.png", (), 3),
        ("the shard has no picture beside the caption", ("no picture",), 4),
        ("s-0.tar/4.png", (), 5),
        ("s-0.tar/5.png", ("a fox",), 6),
        ("s-1.tar/0.png", ("x",), 1),
        ("the shard is cut off or damaged (unexpected end of data): what follows is lost", (), 2),
    ]
    assert entries[4].problem.startswith("the JSON member holds a dict")
    assert shown(read_entries(PairSource(pattern, text="caption")))[6][1] == ("y",)
    labelled = read_entries(PairSource(pattern, label="label", templates=("a {}",)))
    assert [entry.texts for entry in labelled[:3]] == [["a dog"], [], []]

    write_shard(tmp_path / "empty.tar", {"a.bin": b"x"})
    with pytest.raises(DataError, match="holds no pictures with captions"):
        read_entries(PairSource(str(tmp_path / "empty.tar")))


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_text_in_json_stands_for_none(empty: str, tmp_path: Path) -> None:
    members = {
        "0.png": picture_bytes(0),
        "0.json": json.dumps({"text": empty}),
        "0.txt": "a dog",
        "1.png": picture_bytes(1),
        "1.json": json.dumps({"text": empty, "caption": "a cat"}),
    }
    entries = read_entries(PairSource(str(write_shard(tmp_path / "s.tar", members))))
    assert [entry.texts for entry in entries] == [["a dog"], ["a cat"]]


def test_samples_with_two_pictures_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"0.png": picture_bytes(0), "0.jpg": picture_bytes(1), "0.txt": "a dog", "1.png": picture_bytes(2)}
    entries = read_entries(PairSource(str(write_shard(tmp_path / "s.tar", members))))
    assert shown(entries) == [("s.tar/0.png", ("a dog",), 1), ("s.tar/1.png", (), 2)]
    (message,) = caplog.messages
    assert message.startswith("1 samples have more than one picture, and of each only the first is taken: ")
    assert message.endswith("s.tar: 0'")


CELL = st.one_of(st.none(), st.text(st.characters(exclude_categories=("Cs",)), max_size=8))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([".jsonl", ".parquet"]),
    st.lists(st.tuples(CELL, st.lists(CELL, max_size=3)), min_size=1, max_size=5),
)
def test_any_cells_survive(suffix: str, rows: list[tuple[str | None, list[str | None]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder) / f"t{suffix}", rows)
        found = list(read_cells(table, ("image", "text")))
    assert [row for row, _ in found] == list(range(1, len(rows) + 1))
    assert [(cells["image"], cells["text"]) for _, cells in found] == [
        ([] if image is None else [image], [text or "" for text in texts]) for image, texts in rows
    ]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet", ".tar"]), st.binary(max_size=60))
def test_arbitrary_bytes_give_entries_or_a_data_error(suffix: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t{suffix}"
        path.write_bytes((b"image,text\n" if suffix == ".csv" else b"") + content)
        with contextlib.suppress(DataError):  # any other error fails the test
            assert read_entries(PairSource(str(path)))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_no_name_of_a_picture_leads_out(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder) / "t.jsonl", [(name, "x")])
        with contextlib.suppress(DataError):
            (entry,) = read_entries(PairSource(str(table)))
            if isinstance(entry.picture, PictureFile):
                assert entry.picture.path.is_relative_to(Path(folder).resolve())
