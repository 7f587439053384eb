"""What is to be embedded, cut into shards that any process can do by itself, in any order, once more if need be."""

from __future__ import annotations

import csv
import io
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from trimtab.data.captions import sample_texts
from trimtab.data.images import ImageError, is_address
from trimtab.data.manifests import SUFFIXES, iter_rows, read_text
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
from trimtab.errors import DataError
from trimtab.files import digest_of
from trimtab.serve.store import SCORE, SOURCE_COLUMN, VECTOR, Kind


@dataclass(frozen=True, slots=True)
class Item:
    """One picture or text.

    Attributes:
        source: the text; or the picture's path as the input names it.
        kept: further columns of its row.
        picture: where the picture lies.
    """

    id: str
    source: str
    kept: tuple[str, ...] = ()
    picture: PictureFile | str | None = None
    """A text says why there is no picture."""


@dataclass(frozen=True)
class Work:
    """One shard to make.

    Attributes:
        number: of the shard.
        digest: names its items and the states of their files.
        items: what it shall hold; of a webdataset shard None, as the worker reads it.
        archive: that webdataset shard.
        prefix: of the ids in it: the shard's name where there are several.
    """

    number: int
    digest: str
    items: tuple[Item, ...] | None = None
    archive: str | None = None
    prefix: str = ""


@dataclass(frozen=True)
class Input:
    """An input that exists, and how it is read.

    Attributes:
        place: "table", "folder" or "archives".
        of: what is embedded of it.
        column: of a table, where the pictures or texts stand.
        id_column: of a table, where the ids stand; None takes the paths of pictures and the rows of texts.
        keep: further columns of a table, empty where a row has none.
        root: folder that the paths in a table are relative to.
    """

    path: str
    place: Literal["table", "folder", "archives"]
    of: Kind
    column: str = ""
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    root: Path = Path()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of a shard beside the vectors."""
        return ("id", SOURCE_COLUMN[self.of], *self.keep)

    def described(self) -> dict[str, str]:
        """For the description of the embeddings; `root` is where the paths of pictures start."""
        root = Path(self.path).parent if self.place == "archives" else self.root if self.place == "table" else self.path
        return {"path": self.path, "place": self.place, "root": str(Path(root).resolve())}

    def check(self) -> int | None:
        """Read the whole input once, without opening a picture; its number of items where that can be told at once.

        Raises:
            DataError: a row that cannot be used, or an id that is empty or stands in two rows.
        """
        if self.place == "archives":
            expand_shards(self.path)
            return None
        ids = array("q", (hash(item.id) for item in self._items()))  # 8 bytes each, for inputs of any size
        if not ids:
            raise DataError(f"{self.path}: holds no {self.of}")
        if self.id_column:
            self._refuse_repeated(self.id_column, np.sort(np.frombuffer(ids, np.int64)))
        return len(ids)

    def works(self, shard_size: int) -> Iterator[Work]:
        """All shards, in order; a table or folder in parts of `shard_size`, each webdataset shard as a whole.

        Raises:
            DataError: see `open_input`; a row that cannot be used is named.
        """
        if self.place == "archives":
            paths = expand_shards(self.path)
            around = os.path.commonpath([path.parent for path in paths])
            for number, path in enumerate(paths):
                prefix = f"{path.relative_to(around).as_posix()}/" if len(paths) > 1 else ""
                yield Work(
                    number,
                    digest_of(self.of, path.name, prefix, _state(path)),
                    archive=str(path.resolve()),
                    prefix=prefix,
                )
            return
        items = self._items()
        number = 0
        while some := tuple(islice(items, shard_size)):
            parts = (part for item in some for part in (item.id, item.source, *item.kept, *_states(item)))
            yield Work(number, digest_of(self.of, *self.columns, *parts), items=some)
            number += 1

    def _items(self) -> Iterator[Item]:
        return self._folder_items() if self.place == "folder" else self._table_items()

    def _folder_items(self) -> Iterator[Item]:
        root = Path(self.path).resolve()
        inside = PictureFolder(root)
        for where, subfolders, files in walk(root):
            below = where.relative_to(root)
            for name in subfolders:
                if (where / name).is_symlink():
                    linked = readable_name((below / name).as_posix())
                    yield Item(linked, linked, (), "is a link to a folder, which is not followed: copy the folder")
            for name in picture_names(files):
                picture = (below / name).as_posix()
                if (shown := readable_name(picture)) != picture:
                    yield Item(shown, shown, (), NOT_UTF8)
                else:
                    yield _picture_item(picture, inside, self.path, 0)

    def _table_items(self) -> Iterator[Item]:
        optional = (*self.keep, *((self.id_column,) if self.id_column else ()))
        seen: set[int] = set()
        root = PictureFolder(self.root)
        for record in iter_rows(self.path, (self.column,), optional=optional, nullable=(self.column,)):
            values = record.values
            kept = tuple(values[name] for name in self.keep)
            own = values[self.id_column] if self.id_column else None
            if own is not None and not own.strip():
                raise self._unusable_id(record.row, f"{self.id_column!r} is empty")
            if self.of == "texts":
                yield Item(str(record.row) if own is None else own, values[self.column], kept)
                continue
            name = values[self.column].strip()
            if own is None:  # pictures with several captions stand in several rows
                if (key := hash(name)) in seen:
                    continue
                seen.add(key)
            yield _picture_item(name, root, self.path, record.row, kept, own)

    def _refuse_repeated(self, column: str, hashes: np.ndarray) -> None:
        """Name the rows of an id that stands in two; `hashes` are those of all ids, sorted."""
        repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        rows: dict[str, int] = {}
        rows_again = iter_rows(self.path, (self.column,), optional=(column,), nullable=(self.column,))
        for record in rows_again if repeated else ():
            own = record.values[column]
            if hash(own) in repeated and (before := rows.setdefault(own, record.row)) != record.row:
                raise self._unusable_id(record.row, f"{column!r} is {own!r}, as in row {before}")

    def _unusable_id(self, row: int, what: str) -> DataError:
        other = f"take the paths with --id {self.column}" if self.of == "images" else "name another column with --id"
        return DataError(f"{self.path}, row {row}: {what}: give each row an id of its own, or {other}")


def _states(item: Item) -> tuple[str, ...]:
    """What changes when the picture of an item does; texts have nothing besides themselves."""
    return (_state(item.picture.path),) if isinstance(item.picture, PictureFile) else ()


def _state(path: Path) -> str:
    """Size and time of a file; in microseconds, as some network file systems keep no more."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns // 1000}"


def _picture_item(
    name: str, root: PictureFolder, file: str, row: int, kept: tuple[str, ...] = (), own: str | None = None
) -> Item:
    path = root.find(name, file=file, row=row) if name else None
    picture = PictureFile(path, name) if path else "the path is empty"
    return Item(name if own is None else own, name, kept, picture)


def open_input(
    path: str | Path,
    *,
    of: str = "auto",
    column: str | None = None,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    root: str | Path | None = None,
) -> Input:
    """Look at an input before any work.

    Args:
        path: a table, a folder of pictures with all folders in it, or webdataset shards such as
            ``shard-{000..012}.tar``.
        of: "images" or "texts"; "auto" takes the pictures where there are any, and the column ``text`` for texts.
        column: of a table: where they stand, ``image`` or ``text`` by default.
        id_column: of a table; ``id`` where there is one. The column of the pictures itself takes each picture once.

    Raises:
        DataError: no such input, columns that a table lacks, options that do not fit.
    """
    text = str(path)
    if of not in ("auto", "images", "texts"):
        raise DataError(f"of={of!r} is unknown; choose images or texts")
    if is_address(text):
        raise DataError(f"{text!r} is an address or a command, and neither is ever opened: download the data")
    is_table = Path(text).suffix.lower() in SUFFIXES and not Path(text).is_dir()
    if not is_table and (column or id_column or keep or root):
        raise DataError(f"{text} is no table: columns and --root have no meaning for it")
    if is_table:
        return _open_table(text, of, column, id_column, tuple(keep), root)
    if text.lower().endswith(".tar"):
        expand_shards(text)
        return Input(text, "archives", "texts" if of == "texts" else "images")
    if not Path(text).is_dir():
        raise DataError(
            f"{text}: no such input; give a table ({', '.join(SUFFIXES)}), a folder of pictures, or shards such as "
            f"shard-{{000..012}}.tar (current folder: {Path.cwd()})"
        )
    if of == "texts":
        raise DataError(f"{text} is a folder of pictures: give texts as a table with a column `text`")
    return Input(text, "folder", "images")


def _open_table(
    path: str, of: str, column: str | None, id_column: str | None, keep: tuple[str, ...], root: str | Path | None
) -> Input:
    found = table_columns(Path(path))
    by_default = column == "text" or (not column and "image" not in found)
    kind: Kind = "texts" if of == "texts" or (of == "auto" and by_default) else "images"
    wanted = column or SOURCE_COLUMN[kind]
    if id_column is None and "id" in found:
        id_column = "id"
    if id_column == wanted and kind == "images":
        id_column = None
    needed = [wanted, *keep, *([id_column] if id_column else [])]
    if missing := [name for name in needed if name not in found]:
        raise DataError(f"{path}: has no column {', '.join(map(repr, missing))}; columns found: {', '.join(found)}")
    if twice := [name for name in needed if found.count(name) > 1]:
        raise DataError(f"{path}: column {twice[0]!r} stands in the header {found.count(twice[0])} times: rename one")
    if taken := {"id", SOURCE_COLUMN[kind], VECTOR, SCORE} & set(keep):
        raise DataError(f"--keep {min(taken)}: that name is taken by a column of the results; rename it in {path}")
    base = Path(path).parent if root is None else Path(root)
    if not base.is_dir():
        raise DataError(f"--root {base}: no such folder")
    return Input(path, "table", kind, wanted, id_column, keep, base.resolve())


def table_columns(path: Path) -> list[str]:
    """Names of the columns of a table; of JSON lines those of the first.

    Raises:
        DataError: it cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return list(pq.read_schema(path).names)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: is not a readable Parquet file ({error})") from error
    text = read_text(path)
    if path.suffix.lower() != ".jsonl":
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        return [name.strip() for name in next((row for row in rows if any(map(str.strip, row))), [])]
    first = next((line for line in text.split("\n") if line.strip()), None)
    if first is None:
        raise DataError(f"{path}: is empty")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, row 1: is not JSON ({error}): give one object per line") from None
    return list(map(str, record)) if isinstance(record, dict) else []


def items_of(work: Work, of: Kind) -> tuple[Iterable[Item], str]:
    """Items of a shard, and what is wrong with the webdataset shard that they come from, if anything."""
    if work.archive is None:
        return work.items or (), ""
    path = Path(work.archive)
    samples, damage = read_shard(path)
    if of == "texts":
        return [Item(work.prefix + stem, _shard_text(sample)) for stem, sample in samples.items()], damage
    return [
        Item(work.prefix + stem, one.picture.name if isinstance(one.picture, PictureFile) else stem, (), one.picture)
        for stem, one in samples.items()
    ], damage


def _shard_text(sample: ShardSample) -> str:
    """The first caption of a sample, as a run of `adapt` reads it; "" if there is none."""
    try:
        return next((text.strip() for text in sample_texts(sample)), "")
    except DataError:
        return ""


def encoded_picture(item: Item) -> Path | bytes:
    """What the image tower is given.

    Raises:
        ImageError: there is no picture, or its bytes cannot be read.
    """
    picture = item.picture
    if not isinstance(picture, PictureFile):
        raise ImageError(item.source, str(picture))
    if picture.offset is None:
        return picture.path
    if picture.length > 256 << 20:
        raise ImageError(str(picture), f"has {picture.length >> 20} MB, which is too much for a picture")
    try:
        return picture.read_bytes()
    except OSError as error:
        raise ImageError(str(picture), f"cannot be read ({error.strerror or error})") from error


def is_readable(item: Item) -> bool:
    """Whether the system gives the first byte of a picture."""
    if not isinstance(item.picture, PictureFile):
        return False
    try:
        with item.picture.path.open("rb") as stream:
            stream.read(1)
    except OSError:
        return False
    return True
