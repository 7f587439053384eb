from __future__ import annotations

import csv
import io

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trimtab.data.tsv import tsv_records

HEADER = "target\tenglish\n"


def records(text: str) -> list[tuple[int, list[str]]]:
    """Rows and fields without header and blank lines."""
    return [(record.row, record.fields) for record in tsv_records(text) if any(map(str.strip, record.fields))][1:]


def written(rows: list[list[str]]) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter="\t").writerows(rows)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            '"Hallo, sagte er.\tHello, he said.\nWie geht es dir?"\tHow are you?\nGut\tFine\n',
            [
                (2, ['"Hallo, sagte er.', "Hello, he said."]),
                (3, ['Wie geht es dir?"', "How are you?"]),
                (4, ["Gut", "Fine"]),
            ],
        ),
        ('"Ja" sagte er\t"Yes" he said', [(2, ['"Ja" sagte er', '"Yes" he said'])]),
        ('"Ja", "nein"\t"Yes", "no"\n', [(2, ['"Ja", "nein"', '"Yes", "no"'])]),
        ('"Ja"\t"say ""yes"""\n', [(2, ["Ja", 'say "yes"'])]),
        ('"\t""\n"""\t""""\n', [(2, ['"', ""]), (3, ['"""', '"'])]),
        ('Er sagte: "Ja\tHe said: "Yes\n', [(2, ['Er sagte: "Ja', 'He said: "Yes'])]),
        # Right so far, and what follows is not a row: a text of several lines.
        ('a\t"b\n\nc"\r\nd\te\r\n', [(2, ["a", "b\n\nc"]), (5, ["d", "e"])]),
        ('"a\r\nb"\t"c\nd"\ne\tf\n', [(2, ["a\r\nb", "c\nd"]), (5, ["e", "f"])]),
        ('"a\tb"\tc\n"d\t\te\nf"\tg\n', [(2, ["a\tb", "c"]), (3, ["d\t\te\nf", "g"])]),
        ('a\t"b\n', [(2, ["a", '"b'])]),
        ('a\t"b\n\n\n', [(2, ["a", '"b'])]),
    ],
)
def test_lines_and_quotes(body: str, expected: list[tuple[int, list[str]]]) -> None:
    assert records(HEADER + body) == expected


def test_a_column_alone_has_a_text_per_line() -> None:
    assert records('text\n"Hallo\nWie?"\n"a\tb"\n') == [(2, ['"Hallo']), (3, ['Wie?"']), (4, ["a\tb"])]


def test_what_is_no_row_is_given_as_it_stands() -> None:
    body = '"oops\n' + "a\tb\n" * 3 + 'c"\td\n'
    first, *others = list(tsv_records(HEADER + body))[1:]
    assert first == (2, ['"oops'], True)
    assert others[-1] == (6, ['c"', "d"], False)
    assert list(tsv_records(HEADER + 'a\tb\tc\n"a\tb\tc" d\n'))[1:] == [
        (2, ["a", "b", "c"], False),
        (3, ['"a', "b", 'c" d'], False),
    ]


def test_a_header_takes_one_line() -> None:
    assert [record.fields for record in tsv_records('\n"target\tenglish\na\tb"\n')] == [
        [""],
        ['"target', "english"],
        ["a", 'b"'],
    ]
    assert [record.fields for record in tsv_records('"a\tb"\t"c"\n1\t2\n')] == [["a\tb", "c"], ["1", "2"]]


def texts(*kept_out: str) -> st.SearchStrategy[str]:
    """Quotes, tabs and line breaks more often than others; NUL and half characters are refused before."""
    others = st.characters(exclude_categories=("Cs",), exclude_characters="\0\r\n\t")
    special = [one for one in ('"', "\t", "\n", "\r\n", "\r", "a") if one not in kept_out]
    return st.lists(st.one_of(st.sampled_from(special), others), max_size=8).map("".join)


def tables(fields: st.SearchStrategy[str], least: int = 1) -> st.SearchStrategy[list[list[str]]]:
    """Rows of one width, each with something in it: blank rows do not count."""
    return st.integers(least, 4).flatmap(
        lambda width: st.lists(
            st.lists(fields, min_size=width, max_size=width).filter(lambda row: any(map(str.strip, row))), max_size=6
        ).map(lambda rows: [[f"column {i}" for i in range(width)], *rows])
    )


@settings(deadline=None)
@given(st.one_of(tables(texts("\r", "\n", "\r\n")), tables(texts("\t"), least=2)))
def test_what_is_quoted_is_read_back(table: list[list[str]]) -> None:
    """Tabs or line breaks; in a record with both a line may look like a row."""
    assert [fields for _, fields in records(written(table))] == table[1:]


@settings(deadline=None)
@given(tables(texts("\t", "\r", "\n", "\r\n")))
def test_what_is_not_quoted_is_read_as_it_stands(table: list[list[str]]) -> None:
    assume(not any(len(field) > 1 and field[0] == field[-1] == '"' for row in table for field in row))
    text = "".join("\t".join(row) + "\n" for row in table)
    assert records(text) == list(enumerate(table[1:], start=2))


@settings(deadline=None)
@given(tables(texts()))
def test_lines_are_taken_once_and_in_order(table: list[list[str]]) -> None:
    text = written(table)
    found = list(tsv_records(text))
    assert [record.row for record in found] == sorted({record.row for record in found})
    assert found[-1].row <= len(list(io.StringIO(text, newline="")))
