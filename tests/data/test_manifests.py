from __future__ import annotations

import contextlib
import csv
import json
import os
import tempfile
from math import inf, nan
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trimtab.data.manifests import (
    close_match,
    index_classes,
    read_class_names,
    read_classification,
    read_retrieval,
    read_rows,
    read_text,
)
from trimtab.errors import DataError

COLUMNS = ("target", "english")
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
NO_NUL = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30)


def write_table(path: Path, rows: list[tuple[Any, ...]], columns: tuple[str, ...] = COLUMNS) -> Path:
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row)), ensure_ascii=len(rows) % 2 == 0) for row in rows]
        path.write_bytes(("\n".join(lines) + "\n").encode())
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)}), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *rows])
    return path


def values(path: Path, columns: tuple[str, ...] = COLUMNS) -> list[tuple[str, ...]]:
    return [tuple(row.values[name] for name in columns) for row in read_rows(path, columns)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]).flatmap(
        lambda suffix: st.tuples(
            st.just(suffix),
            st.lists(
                st.tuples(*[ANY_TEXT if suffix in (".jsonl", ".parquet") else NO_NUL] * 2),
                min_size=1,
                max_size=6,
            ),
        )
    )
)
def test_any_unicode_survives_every_format(case: tuple[str, list[tuple[str, str]]]) -> None:
    suffix, rows = case
    if suffix in (".csv", ".tsv"):
        rows = [row for row in rows if any(map(str.strip, row))]
        assume(rows)
        if suffix == ".tsv":  # a line of such a record may look like a row
            assume(not any("\t" in text and ("\n" in text or "\r" in text) for text in map("".join, rows)))
    with tempfile.TemporaryDirectory() as folder:
        assert values(write_table(Path(folder) / f"t{suffix}", rows)) == rows


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_order_of_columns_and_others_do_not_matter(suffix: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / f"t{suffix}", [("x", "dog", "狗"), ("y", "cat", "猫")], ("id", "english", "target"))
    assert values(path) == [("狗", "dog"), ("猫", "cat")]
    rows = read_rows(path, ("target",), optional=("id", "note"))
    assert rows[1].values == {"target": "猫", "id": "y", "note": ""}


def test_bom_crlf_and_quoted_newlines(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefftarget, english\r\n"两\r\n行","two ""lines"""\r\n\r\n狗,dog'.encode())
    rows = read_rows(path, COLUMNS)
    assert [tuple(row.values.values()) for row in rows] == [("两\r\n行", 'two "lines"'), ("狗", "dog")]
    assert [row.row for row in rows] == [2, 5], "rows are the lines on which the user finds them"


def test_rows_of_blanks_alone_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b" \n,,\ntarget,english\na,b\n,\n \n,c\n, ,\n")
    rows = read_rows(path, COLUMNS)
    assert [(row.row, *row.values.values()) for row in rows] == [(4, "a", "b"), (7, "", "c")]


def test_fields_may_have_any_length(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", [("x" * 200_000, "y")])
    assert len(read_rows(path, COLUMNS)[0].values["target"]) == 200_000


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("一隻黑貓睡在沙發上，紅色的腳踏車靠著牆", "big5", "perhaps from BIG5 or .*: iconv -f BIG5 "),
        ("黒い猫がソファーで寝ている", "shift_jis", "iconv -f SHIFT_JIS "),
        ("リンゴ", "shift_jis", "iconv -f SHIFT_JIS "),
        ("검은 고양이가 소파에서 잔다", "euc_kr", "perhaps from EUC-KR or .*: iconv -f EUC-KR "),
        ("红色的自行车，靠着墙", "gb18030", "iconv -f GB18030 "),
        ("été à la plage", "cp1252", "for WINDOWS-1252 text as this seems to be: iconv -f WINDOWS-1252 "),
        ("it’s a “big” one", "cp1252", "iconv -f WINDOWS-1252 "),
    ],
)
def test_encodings_are_guessed(text: str, encoding: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(f"target,english\n{text},x\n".encode(encoding))
    with pytest.raises(DataError, match=message):
        read_rows(path, COLUMNS)


def test_jsonl_details(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    text = '{"target": "a\u2028b", "english": 7, "note": null}\r\n\n{"target": "\\u0000", "english": 0.5}\n'
    path.write_bytes(text.encode("utf-8-sig"))
    rows = read_rows(path, COLUMNS, optional=("note",))
    assert [tuple(row.values.values()) for row in rows] == [("a\u2028b", "7", ""), ("\0", "0.5", "")]
    assert [row.row for row in rows] == [1, 3]


def test_parquet_numbers_dictionaries_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table(
        {
            "target": pa.array(["狗", "猫"]).dictionary_encode(),
            "english": pa.array([1, 2]),
            "note": pa.array([None, "x"]),
        }
    )
    pq.write_table(table, path)
    rows = read_rows(path, COLUMNS, optional=("note",))
    assert [tuple(row.values.values()) for row in rows] == [("狗", "1", ""), ("猫", "2", "x")]
    with pytest.raises(DataError, match=r"t\.parquet, row 1: 'note' is null"):
        read_rows(path, ("note",))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_nan_is_a_missing_cell_and_whole_floats_are_whole(suffix: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / f"t{suffix}", [(0.0, 2.5, nan), (1.0, -3.0, 1e300)], (*COLUMNS, "note"))
    rows = read_rows(path, COLUMNS, optional=("note",))
    assert [tuple(row.values.values()) for row in rows] == [("0", "2.5", ""), ("1", "-3", "1e+300")]
    with pytest.raises(DataError, match=r"row 1: 'note' is null: fill it in"):
        read_rows(path, ("note",))
    write_table(path, [("a", 1.0), ("b", inf)])
    with pytest.raises(DataError, match=r"row 2: 'english' is infinite"):
        read_rows(path, COLUMNS)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_null_is_empty_where_that_is_asked_for(suffix: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / f"t{suffix}", [("狗", None), ("猫", "cat"), (None, None)])
    rows = read_rows(path, COLUMNS, nullable=COLUMNS)
    assert [tuple(row.values.values()) for row in rows] == [("狗", ""), ("猫", "cat"), ("", "")]
    with pytest.raises(DataError, match=r"row 1: 'english' is null: fill it in"):
        read_rows(path, COLUMNS, nullable=("target",))
    with pytest.raises(DataError, match=r"no (column )?'german'"):
        read_rows(path, (*COLUMNS, "german"), nullable=(*COLUMNS, "german"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", r"t\.csv: is empty"),
        ("t.csv", b"\xef\xbb\xbf\n\n", "is empty"),
        ("t.csv", b"target,english\n", "no rows"),
        ("t.jsonl", b"\n \n", "is empty"),
        ("t.parquet", b"", "is empty"),
        ("t.parquet", b"PAR1 not really PAR1", "Parquet"),
        ("t.csv", b"zh,en\na,b\n", "no column 'target', 'english'; columns found: zh, en"),
        ("t.csv", b"target\tenglish\na\tb\n", r"tab-separated: name the file \.tsv"),
        ("t.tsv", b"target,english\na,b\n", r"comma-separated: name the file \.csv"),
        ("t.csv", b"target,english,target\na,b,c\n", "'target' stands in the header 2 times"),
        ("t.csv", b"target,english\na,b\nc,d,e\n", "row 3: has 3 fields, the header has 2"),
        ("t.csv", b"target,english\na\n", "row 2: has 1 fields"),
        ("t.csv", b'target,english\n"a\nb,c\n', "row 2: a quote that opens in this row is never closed"),
        ("t.csv", b'target,english\na,b\n"c,d\n' + b"x,y\n" * 50_000, "row 3: a quote that opens in this row"),
        ("t.csv", b'target,english\n"a" b,c\n', "row 2: .*quote"),
        ("t.tsv", b'target\tenglish\n"a" b\tc\td\n', "row 2: has 3 fields, the header has 2"),
        ("t.tsv", b'target\tenglish\n"a" b\n', "row 2: has 1 fields, .*: quote fields that hold the separator$"),
        ("t.tsv", b'target\tenglish\na\tb\n"c\n' + b"x\ty\n" * 50_000, "row 3: has 1 fields, .*a quote opens in this"),
        ("t.csv", b"target;english\na;b\n", "semicolon-separated: save it with commas"),
        ("t.tsv", b"target;english\na;b\n", "semicolon-separated: save it with tabs"),
        ("t.csv", b"target,english\n,\n , \n", "no rows"),
        (
            "t.csv",
            "target,english\n狗,dog\n小猫,kitten\n".encode("gb18030"),
            r"byte 16, line 2.*iconv -f GB18030",
        ),
        ("t.csv", "target,english\nchât ,cat\n".encode("cp1252"), "iconv -f WINDOWS-1252"),
        ("t.csv", "target,english\n狗,dog\n".encode("utf-16"), "iconv -f UTF-16"),
        ("t.csv", b"target,english\na,b\n\0,c\n", "NUL byte on line 3"),
        ("t.jsonl", b'{"target": "a", "english": "b"}\n{"target": "a"\n', "row 2: is not JSON"),
        ("t.jsonl", b'["a", "b"]\n', "row 1: is not an object"),
        ("t.jsonl", b'{"target": "a", "en": "b"}\n', "row 1: has no 'english'; keys found: target, en"),
        ("t.jsonl", b'{"target": "a", "english": ["b"]}\n', "row 1: 'english' holds a list"),
        ("t.jsonl", b'{"target": "\\ud83d", "english": "b"}\n', "row 1: 'target' holds half a character"),
        ("t.jsonl", b'{"target": "a", "english": null}\n', "row 1: 'english' is null: fill it in or remove"),
        ("t.jsonl", b'{"target": "a", "english": ' + b"7" * 5000 + b"}\n", "row 1: is not JSON"),
        ("t.jsonl", b'{"target": ' + b"[" * 100_000, "row 1: is not JSON"),
        ("t.xlsx", b"PK", r"unknown suffix '\.xlsx'.*\.csv"),
        ("t", b"x", "unknown suffix"),
    ],
    ids=lambda value: ascii(value[:20]) if isinstance(value, bytes) else None,
)
def test_bad_tables_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path, COLUMNS)
    assert name in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_an_optional_column_that_is_there_twice_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    if suffix == ".csv":
        path.write_text("image,weight,weight\na,1,2\n", encoding="utf-8")
    else:
        columns = [pa.array(["a"]), pa.array([1]), pa.array([2])]
        pq.write_table(pa.Table.from_arrays(columns, names=["image", "weight", "weight"]), path)
    with pytest.raises(DataError, match="column 'weight' stands in the header 2 times: rename one"):
        read_rows(path, ("image",), optional=("weight",))
    assert len(read_rows(path, ("image",))) == 1


@pytest.mark.parametrize(
    ("found", "wanted", "hint"),
    [
        (("image", "text"), COLUMNS, "are the columns of a domain or prompt recipe"),
        (("image", "label"), COLUMNS, "are the columns of a domain or prompt recipe"),
        (COLUMNS, ("image", "text"), "are the columns of a language recipe"),
        (("image", "text"), ("image", "label"), None),
        (("zh", "en"), COLUMNS, None),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_of_another_link_is_told_from_its_columns(
    suffix: str, found: tuple[str, str], wanted: tuple[str, str], hint: str | None, tmp_path: Path
) -> None:
    table = write_table(tmp_path / f"t{suffix}", [("a", "b")], found)
    with pytest.raises(DataError) as error:
        list(read_rows(table, wanted))
    assert hint in str(error.value) if hint else "recipe" not in str(error.value)


def test_missing_columns_of_parquet(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.parquet", [("a", "b")], ("zh", "en"))
    with pytest.raises(DataError, match="columns found: zh, en"):
        read_rows(path, COLUMNS)
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["target", "english", "target"]), path)
    with pytest.raises(DataError, match="'target' stands in the header 2 times"):
        read_rows(path, COLUMNS)
    pq.write_table(pa.table({"target": [{"bytes": b"x"}], "english": ["a"]}), path)
    with pytest.raises(DataError, match="row 1: 'target' holds a dict"):
        read_rows(path, COLUMNS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"t\.parquet"):
        read_rows(path, COLUMNS)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, message in (
        ("none.csv", "no such file"),
        ("none.parquet", "no such file"),
        ("folder.csv", "folder"),
    ):
        with pytest.raises(DataError, match=message):
            read_rows(tmp_path / name, COLUMNS)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_columns_are_found_in_any_order(suffix: str, tmp_path: Path) -> None:
    rows = [("2", "dog", "", "狗"), ("", "", "", ""), (" ", "", "\u3000", " "), ("", "cat", "x", "猫")]
    path = write_table(tmp_path / f"t{suffix}", rows, ("weight", " english ", "more", "target"))
    read = read_rows(path, COLUMNS, optional=("language", "weight"))
    assert [(row.row, row.values) for row in read] == [
        (2, {"target": "狗", "english": "dog", "language": "", "weight": "2"}),
        (5, {"target": "猫", "english": "cat", "language": "", "weight": ""}),
    ]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([".csv", ".tsv", ".jsonl"]), st.binary(max_size=60))
def test_arbitrary_bytes_give_rows_or_a_data_error(suffix: str, tail: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t{suffix}"
        path.write_bytes((b"a,b\n" if suffix == ".csv" else b"") + tail)
        with contextlib.suppress(DataError):  # any other error fails the test
            assert read_rows(path, ("a",))


def test_class_names(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeff狗\r\n 猫 \r\nfire truck\n\n\n".encode())
    assert read_class_names(path) == ["狗", "猫", "fire truck"]
    for content, message in (
        ("狗\n\n猫\n", "line 2 is blank"),
        ("狗\n猫\n狗 \n", "'狗' stands on line 1 and on line 3"),
        ("\n \n", "empty"),
        ("\u3000\n", "empty"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_class_names(path)
    path.write_bytes("狗\n猫\n".encode("gb18030"))
    with pytest.raises(DataError, match="GB18030"):
        read_class_names(path)


def test_classification(root: Path) -> None:
    path = write_table(root / "m.csv", [("sub/a.jpg", "dog"), ("b.jpg", " cat ")], ("image", "label"))
    items = read_classification(path, ["cat", "dog"])
    assert [(item.path.name, item.label, item.row) for item in items] == [("a.jpg", 1, 2), ("b.jpg", 0, 3)]
    moved = read_classification(path, ["cat", "dog"], root / "sub")
    assert moved[1].path == (root / "sub" / "b.jpg").resolve()
    with pytest.raises(DataError, match=r"--root .*nowhere: no such folder"):
        read_classification(path, ["cat", "dog"], root / "nowhere")


def test_names_in_either_form_of_unicode_are_the_same(root: Path) -> None:
    composed, decomposed = "Äpfel", "A\u0308pfel"
    (root / "classes.txt").write_text(f"Birnen\n{decomposed}\n", encoding="utf-8")
    assert read_class_names(root / "classes.txt") == ["Birnen", composed]
    path = write_table(root / "m.csv", [("a.jpg", composed), ("b.jpg", decomposed)], ("image", "label"))
    for name in (composed, decomposed):
        assert [item.label for item in read_classification(path, ["Birnen", name])] == [1, 1]
    for classes in ([composed, "Birnen", decomposed], ["a", "b", "a "]):
        with pytest.raises(DataError, match="classes 1 and 3 of 3 have the same name"):
            read_classification(path, classes)


def test_a_picture_counts_once_and_has_one_class(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("sub/a.jpg", "dog"), ("b.jpg", "cat"), ("sub/../sub/a.jpg", "dog")]
    items = read_classification(write_table(root / "m.csv", rows, ("image", "label")), ["cat", "dog"])
    assert [(item.label, item.row) for item in items] == [(1, 2), (0, 3)]
    assert "1 rows name a picture and label of rows before" in caplog.text
    path = write_table(root / "m.csv", [*rows, ("b.jpg", "dog")], ("image", "label"))
    with pytest.raises(DataError, match=r"row 5: .*b\.jpg is of class 'dog' here and 'cat' in row 3"):
        read_classification(path, ["cat", "dog"])


def test_labels_that_are_not_classes(root: Path) -> None:
    rows = [("a.jpg", label) for label in ("dgo", "dgo", "bird", "x1", "x2", "x3", "x4", "")]
    path = write_table(root / "m.csv", rows, ("image", "label"))
    with pytest.raises(DataError) as caught:
        read_classification(path, ["cat", "dog"])
    message = str(caught.value)
    for part in (
        "7 labels",
        "2 classes",
        "'dgo' (row 2 and 1 more, do you mean 'dog'?)",
        "'bird' (row 4)",
        "2 more",
    ):
        assert part in message


def test_blanks_around_paths_do_not_count(root: Path) -> None:
    expected = (root / "sub" / "a.jpg").resolve()
    path = write_table(root / "m.csv", [(" sub/a.jpg ", "dog")], ("image", "label"))
    assert [item.path for item in read_classification(path, ["cat", "dog"])] == [expected]
    path = write_table(root / "m.csv", [(" sub/a.jpg", "dog"), ("sub/a.jpg", "dog")], ("image", "text"))
    assert read_retrieval(path).images == [expected]


def test_retrieval_collects_positives(root: Path) -> None:
    rows = [
        ("sub/a.jpg", "a dog"),
        ("b.jpg", "a dog "),
        ("sub/../sub/a.jpg", "the dog"),
        ("sub/a.jpg", "a dog"),
        ("c.jpg", "一只猫"),
    ]
    pairs = read_retrieval(write_table(root / "m.tsv", rows, ("image", "text")))
    assert [path.name for path in pairs.images] == ["a.jpg", "b.jpg", "c.jpg"]
    assert pairs.texts == ["a dog", "the dog", "一只猫"]
    assert pairs.positives == [(0, 0), (1, 0), (0, 1), (2, 2)]


def test_a_caption_in_two_forms_of_unicode_is_one_text(root: Path) -> None:
    rows = [("b.jpg", "caf\u00e9"), ("c.jpg", "cafe\u0301")]
    pairs = read_retrieval(write_table(root / "m.csv", rows, ("image", "text")))
    assert pairs.texts == ["caf\u00e9"]
    assert pairs.positives == [(0, 0), (1, 0)]


def test_a_caption_with_other_blanks_is_one_text(root: Path) -> None:
    rows = [("b.jpg", "a dog\non the  beach"), ("c.jpg", "a dog on the beach"), ("c.jpg", "adog")]
    pairs = read_retrieval(write_table(root / "m.csv", rows, ("image", "text")))
    assert pairs.texts == ["a dog\non the  beach", "adog"]
    assert pairs.positives == [(0, 0), (1, 0), (1, 1)]


def test_a_class_without_a_name_is_refused() -> None:
    with pytest.raises(DataError, match="the name of class 2 of 2 is empty"):
        index_classes(["cat", " "])


def test_retrieval_refuses_empty_texts_and_paths_outside(root: Path) -> None:
    path = write_table(root / "m.jsonl", [("b.jpg", "x"), ("b.jpg", " ")], ("image", "text"))
    with pytest.raises(DataError, match="row 2: the text is empty"):
        read_retrieval(path)
    write_table(path, [("../secret.jpg", "x")], ("image", "text"))
    with pytest.raises(DataError, match=r"m\.jsonl, row 1.*--root"):
        read_retrieval(path)
    widened = read_retrieval(write_table(path, [("secret.jpg", "x")], ("image", "text")), root.parent)
    assert widened.images == [(root.parent / "secret.jpg").resolve()]


def test_read_text_names_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(DataError, match="cannot be read"):
        read_text(path)


def test_among_very_many_classes_no_name_is_guessed() -> None:
    assert close_match("dgo", ["cat", "dog"]) == "dog"
    assert close_match("dgo", ["cat", "dog", *map(str, range(5000))]) is None
