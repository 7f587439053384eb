"""Tables that users write: CSV, TSV, JSONL and Parquet with named columns; every error names file and row."""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import logging
import math
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.data.picture_folder import PictureFolder
from trimtab.data.tsv import Record, tsv_records
from trimtab.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_MOST_COMPARED = 5000


@dataclass(frozen=True, slots=True)
class Row:
    """One record.

    Attributes:
        row: where the user finds it: the line it starts on (CSV, TSV, JSONL), or the position counted
            from 1 (Parquet).
        values: the columns asked for; an optional column that the file lacks, or a null in it, is "".
    """

    row: int
    values: dict[str, str]


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One picture of a classification manifest; `label` indexes the class list."""

    path: Path
    label: int
    row: int


@dataclass(frozen=True)
class RetrievalPairs:
    """Pictures and texts, each once and in the order of the manifest, and which belong together.

    Attributes:
        images: unique paths.
        texts: unique texts, blanks aside.
        positives: (image index, text index); several texts per image and several images per text.
    """

    images: list[Path]
    texts: list[str]
    positives: list[tuple[int, int]]


def read_rows(
    path: str | Path, columns: Sequence[str], *, optional: Sequence[str] = (), nullable: Sequence[str] = ()
) -> list[Row]:
    """Read the named columns of a table; the suffix tells the format.

    Text is UTF-8, with or without a byte-order mark. CSV and TSV have a header and quote as spreadsheets do
    (double quotes, doubled inside), TSV only where `tsv_records` finds that it does; JSONL has one object per line.
    Numbers become text.

    Args:
        path: the manifest.
        columns: columns that must be there.
        optional: columns that are read when they are there.
        nullable: those of `columns` in which a null of JSONL and Parquet is "", as the empty cell of a CSV is.

    Raises:
        DataError: for a missing, empty, wrongly encoded, ragged or otherwise unreadable file, for missing columns
            (the message names those found), and for nulls in other columns.
    """
    rows = list(iter_rows(path, columns, optional=optional, nullable=nullable))
    if not rows:
        raise DataError(f"{path}: has no rows (only a header, or blank lines)")
    return rows


def iter_rows(
    path: str | Path, columns: Sequence[str], *, optional: Sequence[str] = (), nullable: Sequence[str] = ()
) -> Iterator[Row]:
    """As `read_rows`, row by row: a Parquet file is never in memory as a whole. None at all is no error here."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; a manifest is one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix.lower() in (".csv", ".tsv"):
            yield from _read_delimited(path, list(columns), list(optional))
        else:
            reader = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_parquet
            yield from reader(path, list(columns), list(optional), nullable)
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error


def read_text(path: str | Path) -> str:
    """Whole text of a UTF-8 file, without its byte-order mark, line ends as they are.

    Raises:
        DataError: when it is missing, empty, in another encoding, or has NUL bytes; names the line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(_wrong_encoding(path, "byte 1, line 1", ["UTF-16"]))
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise DataError(f"{path}: is empty")
    if (position := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, position) + 1
        raise DataError(
            f"{path}: NUL byte on line {line}: the file is damaged or binary; export it again as UTF-8 text"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"byte {error.start + 1}, line {line}"
        raise DataError(_wrong_encoding(path, where, _guess_encodings(data))) from None


def read_class_names(path: str | Path) -> list[str]:
    """One class name per line, in Unicode's composed form (NFC); blank lines at the end do not count.

    Raises:
        DataError: for blank lines in between and for duplicates, with their line numbers.
    """
    text = unicodedata.normalize("NFC", read_text(path))
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{path}: is empty")
    first_line: dict[str, int] = {}
    for number, name in enumerate(lines, start=1):
        if not name:
            raise DataError(f"{path}: line {number} is blank: give one class name per line")
        if name in first_line:
            raise DataError(
                f"{path}: class name {name!r} stands on line {first_line[name]} and on line {number}: "
                "remove one, or tell them apart by name"
            )
        first_line[name] = number
    return lines


def index_classes(classes: Sequence[str]) -> dict[str, int]:
    """Position of each class by its name in NFC, surrounding blanks aside.

    Raises:
        DataError: two names are the same, or one is empty.
    """
    index: dict[str, int] = {}
    for position, name in enumerate(classes):
        name = unicodedata.normalize("NFC", name).strip()
        if not name:
            raise DataError(f"the name of class {position + 1} of {len(classes)} is empty: give one, or leave it out")
        if index.setdefault(name, position) != position:
            raise DataError(
                f"classes {index[name] + 1} and {position + 1} of {len(classes)} have the same name {name!r}: remove "
                "one, or tell them apart by name"
            )
    return index


def read_classification(
    path: str | Path, classes: Sequence[str], root: str | Path | None = None
) -> list[LabelledImage]:
    """Read a manifest with the columns `image` and `label`; a picture that stands there twice counts once.

    Args:
        path: the manifest.
        classes: class names; a label must equal one of them, surrounding blanks and the form of Unicode aside.
        root: folder of the pictures; the manifest's own by default.

    Raises:
        DataError: for labels that are not among the classes (the first few, with rows and similar names), for
            classes of the same name, for a picture with two labels, and as `read_rows` and `PictureFolder.find`.
    """
    folder = _picture_folder(path, root)
    index = index_classes(classes)
    unknown: dict[str, list[int]] = {}
    items: dict[Path, LabelledImage] = {}
    again = 0
    for record in read_rows(path, ("image", "label")):
        label = unicodedata.normalize("NFC", record.values["label"]).strip()
        if label not in index:
            unknown.setdefault(label, []).append(record.row)
            continue
        image = folder.find(record.values["image"].strip(), file=path, row=record.row)
        if (first := items.get(image)) is None:
            items[image] = LabelledImage(image, index[label], record.row)
        elif first.label == index[label]:
            again += 1
        else:
            raise DataError(
                f"{path}, row {record.row}: {image} is of class {label!r} here and {list(index)[first.label]!r} in row "
                f"{first.row}: a picture has one class; remove a row"
            )
    if unknown:
        shown = [_describe_label(label, rows, list(index)) for label, rows in list(unknown.items())[:5]]
        more = f"; and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise DataError(
            f"{path}: {len(unknown)} labels are not among the {len(index)} classes: {'; '.join(shown)}{more}"
            ". Mend the labels or add them to the class list"
        )
    if again:
        logger.warning("%s: %d rows name a picture and label of rows before: each picture counts once", path, again)
    return list(items.values())


def read_retrieval(path: str | Path, root: str | Path | None = None) -> RetrievalPairs:
    """Read a manifest with the columns `image` and `text`; missing picture files are left to the caller.

    Args:
        path: the manifest.
        root: folder of the pictures; the manifest's own by default.

    Raises:
        DataError: for an empty text, and as `read_rows` and `PictureFolder.find`.
    """
    folder = _picture_folder(path, root)
    images: dict[Path, int] = {}
    texts: list[str] = []
    text_places: dict[str, int] = {}
    positives: dict[tuple[int, int], None] = {}
    for record in read_rows(path, ("image", "text")):
        # Else one caption in two forms of Unicode would be two texts, each wrong for the other's picture.
        text = unicodedata.normalize("NFC", record.values["text"]).strip()
        if not text:
            raise DataError(f"{path}, row {record.row}: the text is empty: write one or remove the row")
        image = folder.find(record.values["image"].strip(), file=path, row=record.row)
        # So it would be with one that has a line break or two blanks in some rows. The first form stays as it is.
        place = text_places.setdefault(" ".join(text.split()), len(texts))
        if place == len(texts):
            texts.append(text)
        positives[images.setdefault(image, len(images)), place] = None
    return RetrievalPairs(list(images), texts, list(positives))


def _picture_folder(path: str | Path, root: str | Path | None) -> PictureFolder:
    base = Path(path).parent if root is None else Path(root)
    if root is not None and not base.is_dir():
        raise DataError(f"--root {base}: no such folder")
    return PictureFolder(base.resolve())


def _describe_label(label: str, rows: list[int], classes: list[str]) -> str:
    where = f"row {rows[0]}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
    near = close_match(label, classes)
    return f"{label!r} ({where}{f', do you mean {near!r}?' if near else ''})"


def close_match(name: str, known: Sequence[str]) -> str | None:
    """A known name that is spelt nearly alike; among very many none is looked for, as that takes seconds for each."""
    near = difflib.get_close_matches(name, known, n=1) if len(known) <= _MOST_COMPARED else []
    return near[0] if near else None


def _read_delimited(path: Path, columns: list[str], optional: list[str]) -> Iterator[Row]:
    tab = path.suffix.lower() == ".tsv"
    text = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # it guards memory, and all of the text is there
    header: list[str] | None = None
    places: list[tuple[str, int | None]] = []  # of the columns asked for, in a row
    for start, fields, unclosed in tsv_records(text) if tab else _csv_records(path, text):
        if not "".join(fields).strip():  # as spreadsheets leave them below the last row
            continue
        if header is None:
            header = [name.strip() for name in fields]
            check_columns(path, header, columns, _separator_hint(fields, tab), optional)
            places = [(name, header.index(name) if name in header else None) for name in (*columns, *optional)]
            continue
        if len(fields) != len(header):
            quote = "; a quote opens in this row and is not closed before the next" if unclosed else ""
            raise DataError(
                f"{path}, row {start}: has {len(fields)} fields, the header has {len(header)} "
                f"({', '.join(header)}): quote fields that hold the separator{quote}"
            )
        yield Row(start, {name: "" if place is None else fields[place] for name, place in places})


def _csv_records(path: Path, text: str) -> Iterator[Record]:
    # newline="" keeps line ends inside quoted fields as they are.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(
                    f"{path}, row {start}: a quote that opens in this row is never closed: close it, or write quotes "
                    "that belong to the text twice, in a quoted field"
                ) from None
            raise DataError(
                f"{path}, row {start}: {error}: a field that starts with a quote, or holds a line break or "
                "the separator, is quoted, and quotes inside it are doubled"
            ) from None
        yield Record(start, fields)


def _separator_hint(header: list[str], tab: bool) -> str:
    if len(header) == 1 and ("," if tab else "\t") in header[0]:
        found, suffix = ("comma", "csv") if tab else ("tab", "tsv")
        return f"; the header looks {found}-separated: name the file .{suffix}"
    if len(header) == 1 and ";" in header[0]:
        return f"; the header looks semicolon-separated: save it with {'tabs' if tab else 'commas'} instead"
    return ""


def check_columns(
    path: Path, found: Sequence[str], columns: Sequence[str], hint: str = "", optional: Sequence[str] = ()
) -> None:
    """Refuse a table that lacks a column, or has it or an optional one twice.

    Raises:
        DataError: names the columns found, and ends with `hint` where one is missing.
    """
    if missing := [name for name in columns if name not in found]:
        listed = ", ".join(found) or "none"
        raise DataError(
            f"{path}: has no column {', '.join(map(repr, missing))}; columns found: {listed}{hint}"
            + _other_link(found, columns)
        )
    for name in (*columns, *optional):
        if found.count(name) > 1:
            raise DataError(f"{path}: column {name!r} stands in the header {found.count(name)} times: rename one")


def _other_link(found: Collection[str], columns: Collection[str]) -> str:
    """Whose a table is that has the columns of another link's recipes than are looked for."""
    if {"target", "english"} <= set(found):
        return "; target and english are the columns of a language recipe"
    if {"image", "text"} <= set(found) or {"image", "label"} <= set(found):
        # Whoever looks for one of them may only lack the other.
        mine = {"image", "text", "label"}.isdisjoint(columns)
        return "; image with text or label are the columns of a domain or prompt recipe" if mine else ""
    return ""


def _read_jsonl(path: Path, columns: list[str], optional: list[str], nullable: Sequence[str]) -> Iterator[Row]:
    filled = [name for name in columns if name not in nullable]
    for number, record in jsonl_records(path, f"write {{{_example(columns)}}}"):
        if missing := [name for name in columns if name not in record]:
            listed = ", ".join(map(str, record)) or "none"
            raise DataError(
                f"{path}, row {number}: has no {', '.join(map(repr, missing))}; keys found: {listed}"
                + _other_link(record, columns)
            )
        _refuse_nulls(path, number, record, filled)
        yield _to_row(path, number, {name: record.get(name) for name in (*columns, *optional)})


def jsonl_records(path: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and object of each line that is not blank.

    Args:
        remedy: what to do about a line that holds something else than an object.

    Raises:
        DataError: a line is no JSON, or no object.
    """
    # Only "\n" ends a record: str.splitlines would also cut at U+2028 inside a string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is no JSONDecodeError
            raise DataError(f"{path}, row {number}: is not JSON ({error}): give one object per line") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, row {number}: is not an object: {remedy}")
        yield number, record


def _example(columns: list[str]) -> str:
    return ", ".join(f'"{name}": "..."' for name in columns)


def _read_parquet(path: Path, columns: list[str], optional: list[str], nullable: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa  # late: it takes longer to import than the rest of this room
    import pyarrow.parquet as pq

    filled = [name for name in columns if name not in nullable]
    with path.open("rb") as stream:
        if not stream.read(1):
            raise DataError(f"{path}: is empty")
        stream.seek(0)
        try:
            table_file = pq.ParquetFile(stream)
            found = list(table_file.schema_arrow.names)
            check_columns(path, found, columns, optional=optional)
            names = [*columns, *(name for name in optional if name in found)]
            number = 0
            for batch in table_file.iter_batches(columns=names):
                for record in batch.to_pylist():
                    number += 1
                    _refuse_nulls(path, number, record, filled)
                    yield _to_row(path, number, {name: record.get(name) for name in (*columns, *optional)})
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: is not a readable Parquet file ({error}): export it again") from error


def is_null(value: Any) -> bool:
    """Whether a cell of JSON or Parquet is missing: null, or the NaN that data frames write in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def cell_text(value: Any, where: str, wanted: str = "text or a number") -> str:
    """Text of a cell of JSON or Parquet, "" of a missing one; the 3.0 of a column of floats is "3".

    Raises:
        DataError: it is neither text nor a finite number; begins with `where`.
    """
    if is_null(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where} holds a {type(value).__name__}, not {wanted}")
    if isinstance(value, float):
        if math.isinf(value):
            raise DataError(f"{where} is infinite: write a text or a finite number")
        if value.is_integer() and abs(value) < 2**53:  # data frames turn whole numbers beside nulls into floats
            return str(int(value))
    return str(value)


def _refuse_nulls(path: Path, number: int, record: dict[str, Any], columns: list[str]) -> None:
    if missing := [name for name in columns if is_null(record[name])]:
        raise DataError(f"{path}, row {number}: {', '.join(map(repr, missing))} is null: fill it in or remove the row")


def _to_row(path: Path, number: int, record: dict[str, Any]) -> Row:
    values = {}
    for name, value in record.items():
        values[name] = cell_text(value, f"{path}, row {number}: {name!r}")
        if not values[name].isascii():
            try:
                values[name].encode()
            except UnicodeEncodeError:  # JSON can escape half a character
                raise DataError(f"{path}, row {number}: {name!r} holds half a character (\\ud800 to \\udfff)") from None
    return Row(number, values)


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file (current folder: {Path.cwd()})"
    if isinstance(error, IsADirectoryError):
        return f"{path}: is a folder, not a file"
    return f"{path}: cannot be read ({error.strerror or error})"


# First bytes of the most frequent signs: common Han, for Japanese kana, for Korean hangul.
_FREQUENT = {"GB18030": (0xB0, 0xD7), "BIG5": (0xA4, 0xC6), "SHIFT_JIS": (0x82, 0x83), "EUC-KR": (0xB0, 0xC8)}
_LEAST_FREQUENT = 0.3


def _guess_encodings(data: bytes) -> list[str]:
    """Encodings that the text may have, the likeliest first."""
    # European letters may decode as East Asian signs too, but nearly all stand alone between ASCII letters. Of the
    # East Asian encodings that is so in Shift-JIS alone.
    runs = re.findall(rb"[\x80-\xff]+", data)
    alone = sum(len(run) == 1 for run in runs) > 0.75 * len(runs)
    shares = {}
    for name in ("SHIFT_JIS",) if alone else _FREQUENT:
        first, last = _FREQUENT[name]
        with contextlib.suppress(UnicodeDecodeError):
            signs = re.sub(r"[\x00-\x7f]", "", data.decode(name))[:10_000]
            frequent = sum(first <= sign.encode(name, "replace")[0] <= last for sign in signs)
            shares[name] = frequent / max(1, len(signs))
    likely = [name for name, share in shares.items() if share >= _LEAST_FREQUENT]
    # Of equally good ones the one that asks for more is the likelier.
    likely.sort(key=lambda name: (-shares[name], _FREQUENT[name][1] - _FREQUENT[name][0]))
    return likely or ["WINDOWS-1252"]


def _wrong_encoding(path: Path, where: str, guesses: list[str]) -> str:
    said = f"for {guesses[0]} text as this seems to be" if len(guesses) == 1 else f"perhaps from {' or '.join(guesses)}"
    return (
        f"{path}: is not UTF-8 ({where}); convert it, {said}: "
        f"iconv -f {guesses[0]} -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}"
    )
