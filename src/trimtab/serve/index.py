"""What is searched: vectors of an embeddings folder, arranged by FAISS, with what each of them stands for.

``flat`` compares with every vector. ``hnsw`` walks a graph of neighbours (Malkov & Yashunin, arXiv 1603.09320).
``ivfpq`` looks into the nearest cells only, at codes of some bytes (Jegou et al., PAMI 2011), and compares the best
again with their vectors on disk. How many of the true neighbours are found is measured and written down.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trimtab.errors import DataError, ModelError, TrimtabError
from trimtab.files import digest_of, plain_name, sha256_of
from trimtab.serve.store import SOURCE_COLUMN, ModelReference, read_description

if TYPE_CHECKING:
    import pyarrow as pa

    from trimtab.towers.dual_encoder import DualEncoder

SCHEMA_VERSION = 1
DESCRIPTION_FILE = "index.json"
FAISS_FILE = "index.faiss"
ITEMS_FILE = "items.arrow"
VECTORS_FILE = "vectors.f16"
KINDS = ("flat", "hnsw", "ivfpq")
# By kind, the first bytes of the file and the class that these stand for.
_CLASSES = {"flat": (b"IxFI", "IndexFlatIP"), "hnsw": (b"IHNf", "IndexHNSWFlat"), "ivfpq": (b"IwPQ", "IndexIVFPQ")}
_FURTHER = 3  # times as many are looked at as are wanted, at the least
_ROWS_KEPT = 100_000
_REPLACED_WITHIN = 0.1  # seconds that renaming the files of an index may take


class Hits(NamedTuple):
    """What a search found: for every query a list, best first.

    Attributes:
        ids: of the items.
        scores: cosines.
        metadata: every column of the item: ``id``, ``image`` or ``text``, and what was kept besides.
    """

    ids: list[list[str]]
    scores: list[list[float]]
    metadata: list[list[dict[str, str]]]


def import_faiss() -> Any:
    """FAISS, or a sentence on how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise TrimtabError("an index needs FAISS: pip install 'trimtab[index]'") from error
    return faiss


@dataclass
class Index:
    """An index folder, open for searching. Threads may share it.

    Attributes:
        folder: where it lies.
        about: its description.
        model: the model that made the vectors.
    """

    folder: Path
    about: dict[str, Any]
    model: ModelReference
    _faiss: Any
    _items: pa.Table
    _vectors: np.ndarray | None = None
    """(N, D) float16 on disk, of an index whose own vectors are codes."""
    _rows: dict[str, int] = field(default_factory=dict)
    """Where items stand that were found lately, by their ids."""

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Index:
        """Open an index folder; one that is replaced meanwhile is read once more.

        Args:
            verify: compare the files with their checksums, about a second per gigabyte.

        Raises:
            DataError: no index folder, a file is missing, cut short or damaged, or of a newer schema.
            TrimtabError: FAISS is not installed.
        """
        folder = Path(folder)
        before = _version(folder)
        try:
            found = cls._open(folder, verify)
        except (DataError, OSError):
            time.sleep(_REPLACED_WITHIN)
            if _version(folder) == before:
                raise
            return cls._open(folder, verify)
        # Else it may be half of one index and half of the next.
        return found if _version(folder) == before else cls._open(folder, verify)

    @classmethod
    def _open(cls, folder: Path, verify: bool) -> Index:
        about = read_description(folder / DESCRIPTION_FILE, SCHEMA_VERSION, "index")
        try:
            model = ModelReference(**about["model"])
            files, count, dim = dict(about["files"]), int(about["count"]), int(about["dim"])
            columns = ("id", SOURCE_COLUMN[about["of"]], *about.get("columns", ()))
            _check_facts(about, files)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"{folder / DESCRIPTION_FILE} is damaged ({error}): index again") from error
        _check_files(folder, files, verify=verify)
        faiss = import_faiss()
        try:
            found = _read_faiss(faiss, folder / FAISS_FILE, about["kind"])
            set_search(found, about["search"])
            items = _map_items(folder / ITEMS_FILE, columns)
        except (RuntimeError, OSError, ValueError, TypeError, OverflowError, AttributeError) as error:
            raise DataError(f"{folder} cannot be read ({str(error).strip()[-200:]}): index again") from error
        if not len(items) == found.ntotal == count:
            raise DataError(f"{folder}: {found.ntotal} vectors, {len(items)} items and a count of {count}: index again")
        if found.d != dim:
            raise DataError(f"{folder}: vectors of {found.d} numbers where {dim} should be: index again")
        vectors = _map_vectors(folder / VECTORS_FILE, (count, dim)) if VECTORS_FILE in files else None
        return cls(folder, about, model, found, items, vectors)

    def __len__(self) -> int:
        return int(self.about["count"])

    @property
    def dim(self) -> int:
        """D of the vectors."""
        return int(self.about["dim"])

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return str(self.about["kind"])

    @property
    def of(self) -> str:
        """ "images" or "texts"."""
        return str(self.about["of"])

    @property
    def checksum(self) -> str:
        """Names what is in its files."""
        files = self.about["files"]
        return digest_of(*(files[name]["sha256"] for name in sorted(files)))[:16]

    @property
    def model_name(self) -> str:
        """What the model of the vectors was loaded by."""
        return self.model.name

    @property
    def model_fingerprint(self) -> str:
        """Of the model that made the vectors; `check_model` says what may search them."""
        return self.model.fingerprint

    def check_model(self, model: DualEncoder) -> None:
        """Refuse a model whose vectors lie in another space.

        Of pictures, a model fits too that differs from theirs in its texts alone: a language that was taught later
        needs no new index.

        Raises:
            ModelError: naming both models.
        """
        if not self.model.fits(model, self.about["of"]):
            raise ModelError(
                f"the index {self.folder} was made with {self.model.name!r} (fingerprint "
                f"{self.model.fingerprint[:16]}), and {model.name!r} (fingerprint {model.fingerprint[:16]}) is another "
                f"model, or prepares {self.about['of']} in another way: search with its own, or embed and index again"
            )

    def search(self, vectors: np.ndarray, k: int = 10) -> Hits:
        """The `k` nearest items of each query, or all if there are fewer.

        Args:
            vectors: (Q, D) floats of any norm, or one (D,).

        Raises:
            DataError: another D, no floats, NaN, or a vector of zeros; `k` below 1.
        """
        queries = checked_queries(vectors, self.dim)
        if k < 1:
            raise DataError(f"k={k} must be at least 1")
        k = min(k, len(self))
        rows, scores = nearest(self._faiss, queries, k, _further(self.about["search"], k, self._faiss), self._vectors)
        found = [self._metadata(one) for one in rows]
        self._remember(rows, found)
        return Hits([[item["id"] for item in one] for one in found], [list(map(float, one)) for one in scores], found)

    def metadata(self, row: int) -> dict[str, str]:
        """Columns of one item by its position."""
        return self._metadata(np.array([row]))[0]

    def find(self, id: str) -> dict[str, str] | None:
        """Columns of an item by its id, None if there is none; unless it was found lately, all ids are read."""
        import pyarrow.compute as pc

        if (row := self._rows.get(id)) is None:
            row = pc.index(self._items.column("id"), id).as_py()
        return None if row < 0 else self.metadata(row)

    def _remember(self, rows: Sequence[np.ndarray], found: Sequence[Sequence[Mapping[str, str]]]) -> None:
        if len(self._rows) > _ROWS_KEPT:
            self._rows = {}
        for at, item in zip(itertools.chain(*rows), itertools.chain(*found), strict=True):
            self._rows[item["id"]] = int(at)

    def _metadata(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, str]]:
        return [self._items.slice(int(row), 1).to_pylist()[0] for row in rows]


def checked_queries(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Queries (Q, D) float32 of unit norm.

    Raises:
        DataError: see `Index.search`.
    """
    queries = np.asarray(vectors)
    if queries.dtype.kind != "f":
        raise DataError(f"query vectors are {queries.dtype}, not floats: give what encode_text or encode_image returns")
    queries = np.atleast_2d(queries).astype(np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise DataError(f"query vectors have the shape {tuple(np.shape(vectors))}; the index has {dim} dimensions")
    norms = np.linalg.norm(queries, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not (norms > 0).all():
        raise DataError("a query vector holds NaN or infinity, or is all zero")
    return np.ascontiguousarray(queries / norms)


def set_search(index: Any, options: Mapping[str, Any]) -> None:
    """Put the search-time settings of a description to work."""
    if "ef_search" in options:
        index.hnsw.efSearch = int(options["ef_search"])
    if "nprobe" in options:
        index.nprobe = int(options["nprobe"])


def nearest(
    index: Any, queries: np.ndarray, k: int, options: Mapping[str, Any], vectors: np.ndarray | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows and cosines of the `k` nearest of each query, or of all if there are fewer.

    Args:
        vectors: (N, D) by which the best of the index are put in order; None trusts the index.
    """
    deep = k if vectors is None else min(index.ntotal, k * int(options.get("rerank", 1)))
    scores, rows = _candidates(index, queries, k, deep, options)  # (Q, deep)
    found_rows, found_scores = [], []
    for query, at, score in zip(queries, rows, scores, strict=True):
        score, at = score[at >= 0], at[at >= 0]
        if vectors is not None and len(at):
            at = np.sort(at)  # in the order of the disk
            exact = vectors[at].astype(np.float32)
            score = exact @ query / np.maximum(np.linalg.norm(exact, axis=1), 1e-12)
            order = np.argsort(-score, kind="stable")[:k]
            at, score = at[order], score[order]
        found_rows.append(at)
        found_scores.append(score)
    return found_rows, found_scores


def _candidates(
    index: Any, queries: np.ndarray, k: int, deep: int, options: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows (Q, deep), best first, of which at least `k` are there; those that are missing are -1."""
    faiss = import_faiss()
    everything, limit, no_limit = index, None, None
    if "ef_search" in options:
        everything = index.storage
        if options["ef_search"] * index.hnsw.nb_neighbors(0) >= index.ntotal:  # the walk would look at as many
            return tuple(everything.search(queries, deep))
        limit = faiss.SearchParametersHNSW(efSearch=options["ef_search"])
    elif "nprobe" in options:
        limit, no_limit = (faiss.SearchParametersIVF(nprobe=cells) for cells in (options["nprobe"], index.nlist))
    scores, rows = index.search(queries, deep, params=limit)
    if (short := (rows >= 0).sum(axis=1) < k).any():  # parts of a graph hang together loosely, cells differ in size
        scores[short], rows[short] = everything.search(queries[short], deep, params=no_limit)
    return scores, rows


def _further(options: Mapping[str, Any], k: int, index: Any) -> dict[str, Any]:
    """The settings of a search for `k`, as those of the description were measured with few."""
    if "ef_search" in options:
        return {**options, "ef_search": max(options["ef_search"], _FURTHER * k)}
    if "nprobe" in options:
        cells = _FURTHER * k * index.nlist // index.ntotal
        return {**options, "nprobe": min(index.nlist, max(options["nprobe"], cells))}
    return dict(options)


def _version(folder: Path) -> tuple[int, int] | None:
    """Changes when the index is replaced."""
    try:
        status = (folder / DESCRIPTION_FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _check_facts(about: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise a ValueError, KeyError, TypeError or AttributeError for what no index has written."""
    if about["kind"] not in KINDS or about["of"] not in SOURCE_COLUMN:
        raise ValueError(f"an index of kind {about['kind']!r} of {about['of']!r}")
    for name, value in about["search"].items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"search has {name}={value!r}")
    needed = (FAISS_FILE, ITEMS_FILE, *((VECTORS_FILE,) if about["kind"] == "ivfpq" else ()))
    if unnamed := [name for name in needed if name not in files]:
        raise ValueError(f"its files lack {unnamed[0]}")
    for name, facts in files.items():
        plain_name(name), int(facts["bytes"]), facts["sha256"]


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, verify: bool) -> None:
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder}: {name} is missing: index again, or copy the folder again")
        if path.stat().st_size != facts["bytes"]:
            raise DataError(f"{path} is cut short or damaged ({path.stat().st_size:,} of {facts['bytes']:,} bytes)")
        if verify and sha256_of(path) != facts["sha256"]:
            raise DataError(f"{path} is damaged (the checksum differs): index again, or copy the folder again")


def _read_faiss(faiss: Any, path: Path, kind: str) -> Any:
    """What `trimtab index` writes of a kind, and nothing else that FAISS could read.

    Other classes may name files anywhere, which FAISS would open for writing.
    """
    start, name = _CLASSES[kind]
    with path.open("rb") as stream:
        found = stream.read(len(start))
    if found != start:
        raise DataError(f"{path} begins with {found!r}, as no {kind} index does: index again, or copy the folder again")
    # Lists on disk may lie deeper in the file. With this flag FAISS wants to know the file's own folder for them, which
    # it cannot of a reader that is no file, and so it refuses them before any is opened.
    with path.open("rb") as stream:
        index = faiss.read_index(faiss.PyCallbackIOReader(stream.read), faiss.IO_FLAG_ONDISK_SAME_DIR)
    inner = {"hnsw": "storage", "ivfpq": "quantizer"}.get(kind)
    read = [(index, name)] if inner is None else [(index, name), (getattr(index, inner), "IndexFlatIP")]
    for one, wanted in read:
        if (given := type(faiss.downcast_index(one)).__name__) != wanted:
            raise DataError(f"{path} holds a {given} where {wanted} should be: index again, or copy the folder again")
    return index


def _map_items(path: Path, columns: Sequence[str]) -> pa.Table:
    """The items, read from disk where they are asked for; each of `columns` is one of theirs."""
    import pyarrow as pa

    try:
        items = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read ({error}): index again, or copy the folder again") from error
    if lacking := [name for name in columns if items.column_names.count(name) != 1]:
        raise DataError(f"{path} has no column {lacking[0]!r}: index again, or copy the folder again")
    return items


def _map_vectors(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Vectors of a shape, read from disk where they are asked for."""
    wanted = math.prod(shape) * np.dtype(np.float16).itemsize
    if (size := path.stat().st_size) != wanted:
        raise DataError(f"{path} has {size:,} bytes where {wanted:,} should be: index again, or copy the folder again")
    return np.memmap(path, np.float16, mode="r", shape=shape)
