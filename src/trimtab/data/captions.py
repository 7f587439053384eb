"""Pictures with their captions as tables, class folders and shards hold them: read, not yet judged.

What a user must mend (columns, encodings, paths that lead out of the data folder, addresses) is a `DataError`.
A row without caption or without picture is an entry that says so, for the caller to count.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from trimtab.config import PairSource
from trimtab.data.images import is_address
from trimtab.data.manifests import SUFFIXES, cell_text, check_columns, is_null, jsonl_records, read_rows
from trimtab.data.parallel import clean_text
from trimtab.data.picture_folder import PictureFolder, walk
from trimtab.data.shards import (
    NOT_UTF8,
    PictureFile,
    ShardSample,
    expand_shards,
    picture_names,
    read_shard,
    readable_name,
)
from trimtab.data.templates import default_templates, fill_all
from trimtab.errors import DataError, RecipeError

logger = logging.getLogger(__name__)

_BETWEEN_WORDS = r"[-_\s]+"
_RECORD_TEXTS = ("caption", "text")  # keys of JSON members, when the source's own is not there

Cells: TypeAlias = "dict[str, list[str]]"
"""Texts of each column of a row: none where it is null or missing, several where it holds a list."""


class Entry(NamedTuple):
    """One row, class-folder picture or sample of a shard.

    Attributes:
        picture: where the picture should be, or why there is none.
        texts: captions; may be empty.
        file: the table, folder or shard.
        row: as `Row.row`; in folders and shards the position, counted from 1.
        problem: why texts are missing, where that is known.
    """

    picture: PictureFile | str
    texts: Sequence[str]
    file: str
    row: int
    problem: str = ""


def read_entries(source: PairSource) -> list[Entry]:
    """All entries of a source, class names turned into captions.

    Raises:
        DataError: the source cannot be used; names file, row and remedy.
        RecipeError: options that do not go with this kind of source.
    """
    path = Path(source.path)
    kind = path.suffix.lower()
    if is_address(source.path):
        raise DataError(f"{source.path!r} is an address or a command, and neither is ever opened: download the data")
    if kind not in SUFFIXES and source.root is not None:
        raise RecipeError(f"root={source.root!r} goes with a table, and {source.path} is none: leave it out")
    if kind in SUFFIXES and not path.is_dir():
        entries, classes = _from_table(path, source), source.label is not None
    elif kind == ".tar":
        entries, classes = _from_shards(source), source.label is not None
    elif path.is_dir():
        entries, classes = _from_folder(path), True
    else:
        problem = "is none of these" if path.exists() else f"does not exist (current folder: {Path.cwd()})"
        raise DataError(
            f"{source.path}: pairs come from a table ({', '.join(SUFFIXES)}), a folder with a folder of pictures per "
            f"class, or uncompressed shards (such as shard-{{000..012}}.tar), and this {problem}"
        )
    if classes:
        return _with_class_captions(entries, source)
    if source.descriptions is not None:
        raise RecipeError(
            f"descriptions={source.descriptions!r} needs class names, and {source.path} is read for captions: name "
            "the column of the classes with label"
        )
    return entries


# Tables


def _from_table(path: Path, source: PairSource) -> list[Entry]:
    if source.root is not None and not Path(source.root).is_dir():
        raise DataError(f"root {source.root}: no such folder (current folder: {Path.cwd()})")
    root = PictureFolder((path.parent if source.root is None else Path(source.root)).resolve())
    column = source.label or source.text
    pictures: dict[str, PictureFile | str] = {}
    entries = []
    for row, cells in read_cells(path, (source.image, column)):
        names = cells[source.image]
        if len(names) > 1:
            raise DataError(f"{path}, row {row}: {source.image!r} holds a list: give one picture per row")
        name = names[0].strip() if names else ""
        if name not in pictures:
            pictures[name] = _picture(name, root, path, row) if name else f"the column {source.image!r} is empty"
        entries.append(Entry(pictures[name], cells[column], str(path), row))
    if not entries:
        raise DataError(f"{path}: has no rows")
    return entries


def _picture(name: str, root: PictureFolder, file: Path, row: int) -> PictureFile:
    try:
        path = root.find(name, file=file, row=row)
    except DataError as error:
        # What is an option of `trimtab evaluate` is a key in a recipe.
        key = "path" if file.is_dir() else "root"
        raise DataError(str(error).replace("with --root", f"as the {key} of this source")) from None
    return PictureFile(path, path.relative_to(root.root).as_posix())


def read_cells(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Cells]]:
    """Rows of a table with the texts of the named columns; JSONL and Parquet may hold lists and nulls.

    Raises:
        DataError: as `trimtab.data.manifests.read_rows`, nulls and lists aside.
    """
    if path.suffix.lower() == ".jsonl":
        yield from _jsonl_cells(path, columns)
    elif path.suffix.lower() == ".parquet":
        yield from _parquet_cells(path, columns)
    else:
        try:
            rows = read_rows(path, columns)
        except DataError as error:
            hint = _COLUMN_HINT if "has no column" in str(error) else ""
            raise DataError(f"{error}{hint}") from error
        for record in rows:
            yield record.row, {name: [record.values[name]] for name in columns}


_COLUMN_HINT = "; a source names its columns: image, and text for captions or label for class names"


def _jsonl_cells(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Cells]]:
    keys: dict[str, None] = {}
    for row, record in jsonl_records(path, "give one object per line"):
        keys |= dict.fromkeys(record)
        yield row, {name: _texts(record.get(name), f"{path}, row {row}: {name!r}") for name in columns}
    check_columns(path, list(keys), columns, _COLUMN_HINT)


def _parquet_cells(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Cells]]:
    import pyarrow as pa  # late: it takes longer to import than the rest of this room
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: no such file (current folder: {Path.cwd()})")
    row = 0
    try:
        with path.open("rb") as stream:
            table = pq.ParquetFile(stream)
            check_columns(path, table.schema_arrow.names, columns, _COLUMN_HINT)
            for batch in table.iter_batches(columns=list(columns)):
                for record in batch.to_pylist():
                    row += 1
                    yield row, {name: _texts(record[name], f"{path}, row {row}: {name!r}") for name in columns}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not a readable Parquet file ({error}): export it again") from error


def _texts(value: Any, where: str) -> list[str]:
    """A cell's texts: of a missing one none, of a list those of its items."""
    items = value if isinstance(value, list) else [] if is_null(value) else [value]
    return [cell_text(item, where, "a text or a list of texts") for item in items]


# Class folders and shards


def _from_folder(folder: Path) -> list[Entry]:
    """Pictures of every folder below, named for the class by the folder that holds them.

    Those that lie in `folder` itself are entries without a picture, and so are those whose names are not UTF-8.
    """
    root = folder.resolve()
    inside = PictureFolder(root)
    entries: list[Entry] = []
    places: dict[str, str] = {}
    empty: list[str] = []
    misnamed = False
    for where, subfolders, files in walk(root):
        for name in subfolders:
            if (where / name).is_symlink():
                raise DataError(f"{where / name}: is a link to a folder, which is not followed: copy the folder")
        names = picture_names(files)
        if where == root:
            for name in map(readable_name, names):
                problem = f"{where / name}: lies in no class folder"
                entries.append(Entry(problem, [], str(folder), len(entries) + 1))
            continue
        below = where.relative_to(root)
        if not names:
            empty += [] if subfolders else [str(below)]
            continue
        for name in list(names):
            if (shown := readable_name((below / name).as_posix())) != (below / name).as_posix():
                names.remove(name)
                entries.append(Entry(f"{root}/{shown}: {NOT_UTF8}", [], str(folder), len(entries) + 1))
        if not names:
            misnamed = True
            continue
        label = clean_text(re.sub(_BETWEEN_WORDS, " ", below.name))
        if (other := places.setdefault(label, str(below))) != str(below):
            raise DataError(
                f"{folder}: the folders {other} and {below} both name the class {label!r}: give their pictures "
                "one folder, rename one, or list the pictures in a table with a column of labels"
            )
        for name in names:
            row = len(entries) + 1
            picture = _picture((below / name).as_posix(), inside, folder, row)
            entries.append(Entry(picture, [label], str(folder), row))
    if not places and not misnamed:
        shards = next(iter(sorted(folder.glob("*.tar"))), None)
        hint = f"; it holds shards: give a pattern such as {shards}" if shards else ""
        raise DataError(f"{folder}: holds no class folders with pictures{hint}")
    _warn_of_folders(folder, set(places.values()), empty)
    return entries


def _warn_of_folders(folder: Path, classes: set[str], empty: list[str]) -> None:
    """What is not seen by looking at the pictures: folders that are no classes, and such as only look like a part."""
    if empty:
        logger.warning("%s: %d folders hold no pictures and are no classes, %r for one", folder, len(empty), empty[0])
    if within := sorted(name for name in classes if str(Path(name).parent) in classes):
        words = "%s: %d folders within the folder of a class are classes of their own, %r for one"
        logger.warning(words, folder, len(within), within[0])


def _from_shards(source: PairSource) -> list[Entry]:
    entries = []
    doubled: list[str] = []
    for path in expand_shards(source.path):
        samples, damage = read_shard(path)
        doubled += [f"{path}: {stem}" for stem, sample in samples.items() if sample.more_pictures]
        for row, sample in enumerate(samples.values(), start=1):
            problem = sample.problem
            try:
                texts = sample_texts(sample, source.text, label=source.label)
            except DataError as error:
                texts, problem = [], str(error)
            entries.append(Entry(sample.picture, texts, str(path), row, problem))
        if damage:  # an entry of its own, so that it is counted and listed
            entries.append(Entry(f"the shard {damage}: what follows is lost", [], str(path), len(samples) + 1))
    if doubled:
        logger.warning(
            "%d samples have more than one picture, and of each only the first is taken: %s",
            len(doubled), _first(doubled),
        )  # fmt: skip
    if not entries:
        raise DataError(f"{source.path}: holds no pictures with captions (members such as 000.jpg and 000.txt)")
    return entries


def sample_texts(sample: ShardSample, text: str = "text", *, label: str | None = None) -> list[str]:
    """Captions of a sample: what its JSON member has, else its `.txt` member. Or its label, which JSON alone has.

    Args:
        text: key of the JSON member that is asked first.
        label: key of a label, in place of captions.

    Raises:
        DataError: the JSON member has something else than texts there.
    """
    keys = (label,) if label else (text, *_RECORD_TEXTS)
    values = (sample.record.get(key) for key in keys)
    value = next((value for value in values if not is_null(value) and str(value).strip()), None)
    texts = _texts(value, "the JSON member")
    return [sample.text] if not texts and not label and sample.text else texts


# Captions of classes


def _with_class_captions(entries: list[Entry], source: PairSource) -> list[Entry]:
    names = dict.fromkeys(clean_text(text) for entry in entries for text in entry.texts)
    named = [name for name in names if name]
    sentences = _descriptions(source, named)
    templates = default_templates(named)[1][:1] if source.templates is None else source.templates
    captions = {name: [*fill_all(templates, [name]), *sentences.get(fold_name(name), [])] for name in named}
    return [
        entry._replace(texts=[caption for text in entry.texts for caption in captions.get(clean_text(text), [""])])
        for entry in entries
    ]


def _descriptions(source: PairSource, names: list[str]) -> dict[str, list[str]]:
    """Sentences by folded class name."""
    if source.descriptions is None:
        return {}
    sentences: dict[str, list[str]] = {}
    for row in read_rows(source.descriptions, ("class", "description"), nullable=("description",)):
        parts = split_sentences(row.values["description"])
        sentences.setdefault(fold_name(row.values["class"]), []).extend(parts)
    lacking = [name for name in names if not sentences.get(fold_name(name))]
    if names and len(lacking) == len(names):
        raise DataError(
            f"{source.descriptions}: describes none of the {len(names)} classes of {source.path}: it has "
            f"{_first(list(sentences))}, and the classes are {_first(names)}"
        )
    if lacking:
        logger.warning(
            "%s: no description for %d of %d classes: %s",
            source.descriptions, len(lacking), len(names), _first(lacking),
        )  # fmt: skip
    return sentences


def split_sentences(text: str) -> list[str]:
    """Sentences of a description, white space tidied; those after "." start with a letter that is no small one."""
    apart = re.sub(r"(?<=[.!?]) (?=([^\W\d_]))", lambda found: " " if found[1].islower() else "\n", clean_text(text))
    parts = re.split(r"(?<=[。！？।؟])|\n", apart)
    return [part.strip() for part in parts if part.strip()]


def fold_name(name: str) -> str:
    """What class names share that differ in case, blanks, hyphens or underscores; "-1" is no "1"."""
    return re.sub(r"(?<=.)" + _BETWEEN_WORDS, " ", clean_text(name)).strip().casefold()


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more
