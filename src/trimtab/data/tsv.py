"""Records of tab-separated text: corpora leave quotes as they are, data frames and spreadsheets quote with them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

_QUOTED = re.compile(r'"([^"]*(?:""[^"]*)*)"')


class Record(NamedTuple):
    """Fields of one record, or of a line that is none.

    Attributes:
        row: the line that it starts on, counted from 1.
        unclosed: a quote opens in this line, and following lines do not close it; fields are as they stand.
    """

    row: int
    fields: list[str]
    unclosed: bool = False


def tsv_records(text: str) -> Iterator[Record]:
    """Records of a table; the first that is not blank is the header, and gives their number of fields.

    A line with as many fields as the header is a record by itself. Were quotes the measure, one that a sentence opens
    and a later one closes would make one record of two. Other lines are read as CSV: quoted fields may hold tabs and
    line breaks. So may the last field of a line of the right number, if no line that follows in it could be a record.

    So a record with both tabs and line breaks in its texts may be taken for several. What has another number of fields
    than the header after all is left to the caller.
    """
    stream = io.StringIO(text, newline="")  # keeps line ends inside quoted fields as they are
    width = 0
    row = 1
    while line := stream.readline():
        record, lines = _read_record(row, line, stream, width)
        if not width and any(field.strip() for field in record.fields):
            width = len(record.fields)
        yield record
        row += lines


def _read_record(row: int, line: str, stream: io.StringIO, width: int) -> tuple[Record, int]:
    """The record that starts with a line, and how many lines it takes."""
    plain = line.rstrip("\r\n").split("\t")
    if '"' not in line:
        return Record(row, plain), 1
    fits = len(plain) == width
    if not fits or any(map(_opens, plain)):
        place = stream.tell()
        fields, lines, unclosed = _read_quoted(line, stream, width)
        if fields is not None and (not fits or len(fields) == width):
            return Record(row, fields), lines
        stream.seek(place)
        if not fits:
            return Record(row, plain, unclosed), 1
    return Record(row, [_unquoted(field) for field in plain]), 1


def _read_quoted(line: str, stream: io.StringIO, width: int) -> tuple[list[str] | None, int, bool]:
    """Fields by the rules of CSV, None if there are none; how many lines they take; whether a quote stays open."""
    fits = _count(line) == width

    def lines() -> Iterator[str]:
        yield line
        for more in stream if width else ():  # a header is one line
            # Without this one quote would take all rows up to the next one, or to the end of the file.
            if _count(more) == width and (fits or '"' not in more):
                return
            yield more

    reader = csv.reader(lines(), delimiter="\t", strict=True)
    try:
        return next(reader), reader.line_num, False
    except csv.Error as error:
        return None, 1, "unexpected end" in str(error)


def _count(line: str) -> int:
    return line.count("\t") + 1


def _opens(field: str) -> bool:
    return field.startswith('"') and not _QUOTED.fullmatch(field)


def _unquoted(field: str) -> str:
    """What a field says that is quoted as a whole; any other as it stands, whatever quotes are in it."""
    if not field.startswith('"') or not (match := _QUOTED.fullmatch(field)):
        return field
    return match[1].replace('""', '"')
