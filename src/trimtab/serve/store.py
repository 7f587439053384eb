"""Folders of embeddings: shards of vectors with their ids, and one description of all of them.

A shard is a Parquet file, or an ``.npy`` file with the other columns beside it in JSON lines. Its note, a JSON file
that is written last, says that it is whole. ``embeddings.json`` is written when all shards are.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trimtab import __version__, files
from trimtab.errors import DataError
from trimtab.files import atomic_path, explain_disk_errors, plain_name, sha256_of, write_json, write_text

if TYPE_CHECKING:
    import pyarrow as pa

    from trimtab.towers.dual_encoder import DualEncoder

SCHEMA_VERSION = 1
DESCRIPTION_FILE = "embeddings.json"
SKIPPED_FILE = "skipped.csv"
VECTOR = "embedding"
"""The column of the vectors."""
SCORE = "score"
"""What a search adds to the columns of what it finds."""

Kind = Literal["images", "texts"]
Format = Literal["parquet", "npy"]
DTYPES = {"float32": np.float32, "float16": np.float16}
# Name of the column that says what was embedded.
SOURCE_COLUMN: dict[str, str] = {"images": "image", "texts": "text"}
_SUFFIXES = {"parquet": ".parquet", "npy": ".npy"}
_LISTED = 1000  # skipped items of one shard that its note names


@dataclass(frozen=True)
class ModelReference:
    """The model that made embeddings.

    Attributes:
        fingerprint: of the whole model.
        image_fingerprint: of what decides where pictures land: models that differ in their texts alone share it.
        text_input_digest, image_input_digest: see `DualEncoder`; "" in folders that do not say.
        place: the folder that a relative name meant; "" for other names, and in older folders.
    """

    name: str
    fingerprint: str
    image_fingerprint: str
    family: str = ""
    embedding_dim: int = 0
    text_input_digest: str = ""
    image_input_digest: str = ""
    place: str = ""

    @classmethod
    def of(cls, model: DualEncoder) -> ModelReference:
        """The reference to a loaded model."""
        from trimtab.towers.hf import portable  # with torch, which a model has loaded and a reader may not

        fingerprints = (model.fingerprint, model.image_fingerprint)
        digests = (model.text_input_digest, model.image_input_digest)
        place = "" if (place := portable(model.name)) == model.name else place
        return cls(model.name, *fingerprints, model.family, model.embedding_dim, *digests, place)

    @property
    def loadable(self) -> str:
        """What to load the model by: its name, or its place where the current folder has nothing of that name.

        Whether it is still the same model is for `fits` to say.
        """
        elsewhere = self.place and not Path(self.name).expanduser().exists() and Path(self.place).is_dir()
        return self.place if elsewhere else self.name

    def fits(self, model: DualEncoder | ModelReference, kind: Kind) -> bool:
        """Whether vectors of `model` may be compared with embeddings that this one made of `kind`."""
        prepared = input_digest(self, kind)
        if prepared and input_digest(model, kind) not in ("", prepared):
            return False
        if self.fingerprint == model.fingerprint:
            return True
        return kind == "images" and self.image_fingerprint == model.image_fingerprint


def input_digest(model: DualEncoder | ModelReference, kind: Kind) -> str:
    """Names how a model prepares items of a kind."""
    return model.image_input_digest if kind == "images" else model.text_input_digest


@dataclass(frozen=True)
class Skipped:
    """An item that could not be embedded."""

    id: str
    source: str
    reason: str


@dataclass(frozen=True)
class ShardNote:
    """What is known of a finished shard.

    Attributes:
        file: name of the file with the vectors.
        items: digest of what the shard was asked to hold.
        rows: embeddings in it.
        skipped: items that are not in it.
        listed: the first thousand of them.
        sha256: of `file`.
        columns: its columns beside the vectors.
        columns_sha256: of the file that holds these where `file` is ``.npy``; "" in older notes too.
        unread: ids of the first thousand items that the system did not let be read.
    """

    file: str
    items: str
    rows: int
    skipped: int
    sha256: str
    columns: tuple[str, ...]
    listed: tuple[Skipped, ...] = ()
    columns_sha256: str = ""
    unread: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """The facts for `Description.shards`."""
        beside = {"columns_sha256": self.columns_sha256} if self.columns_sha256 else {}
        return {"file": self.file, "rows": self.rows, "skipped": self.skipped, "sha256": self.sha256, **beside}


@dataclass(frozen=True)
class Description:
    """What a whole folder holds; attributes as in `ShardNote` and `ModelReference`."""

    of: Kind
    model: ModelReference
    dim: int
    dtype: str
    format: Format
    count: int
    skipped: int
    columns: tuple[str, ...]
    shards: tuple[dict[str, Any], ...]
    input: dict[str, Any] = field(default_factory=dict)


def shard_file(number: int, format: Format) -> str:
    return f"shard-{number:05d}{_SUFFIXES[format]}"


def note_file(number: int) -> str:
    return f"shard-{number:05d}.json"


def shard_paths(path: Path) -> list[Path]:
    """The files of a shard by that of its vectors, which comes first."""
    return [path, path.with_suffix(".jsonl")] if path.suffix == _SUFFIXES["npy"] else [path]


# Writing


def write_shard(
    folder: Path,
    number: int,
    columns: Mapping[str, Sequence[str]],
    vectors: np.ndarray,
    *,
    format: Format,
    items: str,
    skipped: Sequence[Skipped] = (),
    unread: Sequence[str] = (),
) -> ShardNote:
    """Write a shard, and then the note that makes it count.

    Args:
        columns: ``id`` and others, one text per row of `vectors`.
        vectors: (N, D) float32 or float16.
        items: digest of what was asked for.
        unread: see `ShardNote`.

    Raises:
        TrimtabError: the disk is full or the folder cannot be written.
    """
    path = folder / shard_file(number, format)
    if format == "parquet":
        _write_parquet(path, columns, vectors)
    else:
        lines = (json.dumps(dict(zip(columns, row)), ensure_ascii=False) for row in zip(*columns.values()))
        write_text(path.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines))
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, vectors, allow_pickle=False)
    sha256, *beside = map(sha256_of, shard_paths(path))
    note = ShardNote(
        path.name, items, len(vectors), len(skipped), sha256, tuple(columns), tuple(skipped[:_LISTED]),
        "".join(beside), tuple(unread[:_LISTED]),
    )  # fmt: skip
    write_json(folder / note_file(number), asdict(note))
    return note


def _write_parquet(path: Path, columns: Mapping[str, Sequence[str]], vectors: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, dim = vectors.shape
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    arrays = {name: pa.array(list(values), pa.string()) for name, values in columns.items()}
    table = pa.table({**arrays, VECTOR: pa.FixedSizeListArray.from_arrays(flat, dim)})
    with atomic_path(path) as temporary, explain_disk_errors(path):
        # Vectors look like noise to a compressor and to a dictionary.
        pq.write_table(
            table,
            temporary,
            compression="none",
            use_dictionary=False,
            row_group_size=max(count, 1),
            write_statistics=False,
        )


def read_note(folder: Path, number: int) -> ShardNote | None:
    """The note of a finished shard whose files are there, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raw = json.loads((folder / note_file(number)).read_text(encoding="utf-8"))
        listed = tuple(Skipped(**one) for one in raw.pop("listed"))
        note = ShardNote(
            **{**raw, "columns": tuple(raw["columns"]), "listed": listed, "unread": tuple(raw.get("unread", ()))}
        )
        if all(path.is_file() for path in shard_paths(folder / plain_name(note.file))):
            return note
    return None


def write_description(folder: Path, description: Description, skipped: Sequence[Skipped]) -> None:
    """Write what makes a folder whole, and the list of skipped items."""
    if skipped:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("id", "source", "reason"))
        writer.writerows((one.id, one.source, one.reason) for one in skipped)
        write_text(folder / SKIPPED_FILE, text.getvalue())
    else:
        (folder / SKIPPED_FILE).unlink(missing_ok=True)
    versions = {"trimtab": __version__}
    write_json(
        folder / DESCRIPTION_FILE, {"schema_version": SCHEMA_VERSION, **asdict(description), "versions": versions}
    )


# Reading


def read_description(path: Path, schema: int, kind: str) -> dict[str, Any]:
    """A JSON description of a known schema; `kind` is what it describes, "index" or "embeddings".

    Raises:
        DataError: missing, damaged, or of a newer schema.
    """
    if not path.is_file():
        made = {"index": "trimtab index", "embeddings": "trimtab embed"}[kind]
        if not path.parent.is_dir():
            raise DataError(f"{path.parent}: no such folder; `{made}` makes one (current folder: {Path.cwd()})")
        raise DataError(f"{path.parent} holds no {kind}: it has no {path.name}; name a folder that `{made}` wrote")
    return files.read_description(path, schema, DataError, f"make the {kind} again")


@dataclass(frozen=True)
class Embeddings:
    """An embeddings folder that is whole.

    Attributes:
        folder: where it lies.
        about: its description.
    """

    folder: Path
    about: Description

    @classmethod
    def open(cls, folder: str | Path) -> Embeddings:
        """Read the description and check that every shard is there.

        Raises:
            DataError: no such folder, unfinished, damaged, or with shards missing.
        """
        folder = Path(folder)
        if not (folder / DESCRIPTION_FILE).is_file() and (folder / note_file(0)).is_file():
            raise DataError(f"{folder} is not finished: run the same `trimtab embed` again, and it goes on")
        raw = read_description(folder / DESCRIPTION_FILE, SCHEMA_VERSION, "embeddings")
        try:
            about = Description(
                **{name: raw[name] for name in ("of", "dim", "dtype", "format", "count", "skipped")},
                model=ModelReference(**raw["model"]),
                columns=tuple(raw["columns"]),
                shards=tuple(raw["shards"]),
                input=dict(raw.get("input") or {}),
            )
            files = [path for shard in about.shards for path in shard_paths(folder / plain_name(shard["file"]))]
            if sum(shard["rows"] for shard in about.shards) != about.count:
                raise ValueError("the rows of its shards are not as many as its count")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder / DESCRIPTION_FILE} is damaged ({error}): embed again") from error
        if missing := [path.name for path in files if not path.is_file()]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(
                f"{folder}: {missing[0]}{more} of {len(files)} files is missing: run the same `trimtab embed` again, "
                "or copy the folder again"
            )
        return cls(folder.resolve(), about)  # shards are read later, when the current folder may be another

    def __len__(self) -> int:
        return self.about.count

    def blocks(self, *, verify: bool = True) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Shard by shard, the columns (a table of texts) and the vectors (N, D) float32.

        Args:
            verify: compare every shard with its checksum.

        Raises:
            DataError: a shard is damaged, or its vectors are of another kind than the description says.
        """
        for shard in self.about.shards:
            path = self.folder / shard["file"]
            noted = (shard["sha256"], shard.get("columns_sha256"))  # older ones lack the second
            for file, sha256 in zip(shard_paths(path), noted) if verify else ():
                if sha256 and sha256_of(file) != sha256:
                    raise DataError(
                        f"{file} is damaged (the checksum differs): delete it and run `trimtab embed` again"
                    )
            table, vectors = self._read(path)
            if vectors.ndim != 2 or vectors.shape != (shard["rows"], self.about.dim) or vectors.dtype.kind != "f":
                raise DataError(
                    f"{path} holds {vectors.dtype} {vectors.shape} where floats ({shard['rows']}, {self.about.dim}) "
                    "should be: embed again"
                )
            if len(table) != len(vectors):
                raise DataError(f"{path} holds {len(vectors)} vectors and {len(table)} ids: embed again")
            vectors = vectors.astype(np.float32, copy=False)
            if not np.isfinite(vectors).all():
                raise DataError(f"{path} holds NaN or infinity: embed again")
            yield table, vectors

    def _read(self, path: Path) -> tuple[pa.Table, np.ndarray]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self.about.format == "npy":
                lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").split("\n")
                rows = [json.loads(line) for line in lines if line]
                table = pa.table(
                    {name: pa.array([row[name] for row in rows], pa.string()) for name in self.about.columns}
                )
                return table, np.load(path, allow_pickle=False)
            whole = pq.read_table(path)
            column = whole.column(VECTOR).combine_chunks()
            if not pa.types.is_fixed_size_list(column.type):
                raise ValueError(f"column {VECTOR!r} is {column.type}, not a list of a fixed size")
            vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(whole), column.type.list_size)
            return whole.select(list(self.about.columns)), vectors
        except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read ({error}): embed again, or copy the folder again") from error
