"""Make an index of an embeddings folder: the kind by its size, settings by measured recall."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab import __version__
from trimtab.errors import DataError
from trimtab.files import atomic_folder, replaceable, sha256_of, write_json
from trimtab.serve.index import (
    DESCRIPTION_FILE,
    FAISS_FILE,
    ITEMS_FILE,
    KINDS,
    SCHEMA_VERSION,
    VECTORS_FILE,
    import_faiss,
    nearest,
    set_search,
)
from trimtab.serve.store import Embeddings

if TYPE_CHECKING:
    import pyarrow as pa

# Up to here comparing with every vector answers in some milliseconds.
FLAT_UP_TO = 50_000
# A graph needs the vectors and their neighbours in memory.
HNSW_UP_TO = 2_000_000
RECALL_AT = 10
_NEIGHBOURS = 32  # links per vector of the graph
_CONSTRUCTION = 128  # candidates per vector while the graph is built
_EF_SEARCH = (32, 64, 128, 256, 512)
_NPROBE = (4, 8, 16, 32, 64, 128, 256)
_RERANK = 16  # candidates per wanted neighbour that are compared again
_TRAINING_POINTS = 64  # per cell
_AS_NEAR = 1e-4  # by so much a cosine of halves may be off
_COPY = 0.9995  # cosine from which on a vector is a copy of another, as halves can tell
_COPIES_PASSED = 100  # of a query; with more of them it is none
_CROWD = 2 * _NEIGHBOURS + 1  # as many copies of a vector lead to each other alone, by all their links
_MANY_COPIES = 0.1  # share of the vectors


def choose_kind(count: int) -> str:
    """One of `KINDS` for so many vectors."""
    return "flat" if count <= FLAT_UP_TO else "hnsw" if count <= HNSW_UP_TO else "ivfpq"


def build_index(
    embeddings: str | Path,
    out: str | Path,
    *,
    kind: str = "auto",
    queries: str | Path | None = None,
    recall: float = 0.95,
    sample: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write an index folder for `trimtab.serve.index.Index.open`; an index that is there is replaced when done.

    Args:
        embeddings: folder that `trimtab embed` wrote.
        kind: one of `KINDS`, or "auto" for `choose_kind`; where that is a graph and many vectors are copies of each
            other, "flat".
        queries: embeddings folder of typical queries that recall is measured with. Without it a sample of the vectors
            themselves are the queries, each without itself among its neighbours; texts that look for pictures are
            harder than these.
        recall: share of the true ten nearest that `hnsw` and `ivfpq` shall find; the cheapest setting that does is
            kept, or the most thorough if none does.
        sample: queries for that measurement.
        progress: is called with the vectors done and in all.

    Returns:
        the description.

    Raises:
        DataError: the embeddings are not whole or too few for the kind, the queries are none or of another model, or
            `out` holds something else.
        TrimtabError: FAISS is not installed, another process writes `out`, or the disk is full.
    """
    if kind not in (*KINDS, "auto"):
        raise DataError(f"kind={kind!r} is unknown; choose auto, {', '.join(KINDS)}")
    if not 0 < recall <= 1:
        raise DataError(f"recall={recall} must be above 0 and at most 1")
    faiss, source, out = import_faiss(), Embeddings.open(embeddings), Path(out)
    if not len(source):
        raise DataError(f"{embeddings} holds no embeddings: there is nothing to index")
    if not replaceable(out, DESCRIPTION_FILE):
        raise DataError(f"{out} holds something else than an index: choose another folder")
    wanted, kind = kind, choose_kind(len(source)) if kind == "auto" else kind
    copies = _copies(source) if kind == "hnsw" else 0
    if wanted == "auto" and copies >= _MANY_COPIES * len(source):
        kind = "flat"
    typical = None if queries is None else _sample_of(_queries_for(source, queries), sample, seed, verify=True)
    with atomic_folder(out, DESCRIPTION_FILE) as built:
        return _build(faiss, source, built, kind, copies, typical, recall, sample, seed, progress or (lambda *_: None))


def _queries_for(source: Embeddings, folder: str | Path) -> Embeddings:
    """Embedded queries, which must lie in the space of what is indexed: among others any recall could come out."""
    queries = Embeddings.open(folder)
    ours, theirs = source.about.model, queries.about.model
    if queries.about.dim != source.about.dim:
        raise DataError(f"{folder} has {queries.about.dim} dimensions, and {source.folder} {source.about.dim}")
    if not ours.fits(theirs, source.about.of):
        raise DataError(
            f"{folder} was made with {theirs.name!r} (fingerprint {theirs.fingerprint[:16]}), and {source.folder} with "
            f"{ours.name!r} (fingerprint {ours.fingerprint[:16]}), which is another model, or prepares "
            f"{source.about.of} in another way: embed the queries with a model that the index can be searched with"
        )
    if not len(queries):
        raise DataError(f"{folder} holds no embeddings: there is nothing to measure recall with")
    return queries


def _build(
    faiss: Any,
    source: Embeddings,
    folder: Path,
    kind: str,
    copies: int,
    typical: np.ndarray | None,
    recall: float,
    sample: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    index, parameters = _make(faiss, kind, source, seed)
    own = np.sort(np.random.default_rng(seed).choice(len(source), min(sample, len(source)), replace=False))
    asked: list[np.ndarray] = []
    done = 0
    # What is exact is neither measured nor compared again.
    halves = contextlib.nullcontext() if kind == "flat" else (folder / VECTORS_FILE).open("wb")
    with _Items(folder / ITEMS_FILE) as items, halves as raw:
        for table, vectors in source.blocks():
            vectors = unit(vectors)
            index.add(vectors)
            items.write(table)
            asked.append(vectors[own[(own >= done) & (own < done + len(vectors))] - done])
            if raw is not None:
                raw.write(vectors.astype(np.float16).data)  # tofile() does not say that the disk is full
            done += len(vectors)
            progress(done, len(source))
    queries = np.concatenate(asked) if typical is None else typical
    options, measured = _tune(index, kind, queries, typical is None, folder, recall)
    set_search(index, options)
    measured["queries_of"] = "the vectors themselves" if typical is None else "queries"
    with (folder / FAISS_FILE).open("wb") as stream:  # by FAISS itself, not below every path of Windows
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
    if kind == "hnsw":
        (folder / VECTORS_FILE).unlink()
    names = [name for name in (FAISS_FILE, ITEMS_FILE, VECTORS_FILE) if (folder / name).is_file()]
    about = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "of": source.about.of,
        "count": len(source),
        "dim": source.about.dim,
        "metric": "cosine",
        "model": asdict(source.about.model),
        "columns": list(source.about.columns),
        "input": source.about.input,
        "parameters": parameters,
        "search": options,
        "recall": measured,
        "copies": copies,
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names
        },
        "versions": {"trimtab": __version__, "faiss": faiss.__version__},
    }
    write_json(folder / DESCRIPTION_FILE, about)
    return about


def _make(faiss: Any, kind: str, source: Embeddings, seed: int) -> tuple[Any, dict[str, Any]]:
    """An index without vectors, trained where that is needed, and its parameters."""
    dim, count = source.about.dim, len(source)
    if kind == "flat":
        return faiss.IndexFlatIP(dim), {}
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _CONSTRUCTION
        return index, {"neighbours": _NEIGHBOURS, "ef_construction": _CONSTRUCTION}
    cells = max(1, min(65_536, round(4 * math.sqrt(count)), count // 39))
    bytes_each = next(m for m in range(min(64, dim // 4 or 1), 0, -1) if dim % m == 0)
    bits = 8 if count >= 256 * 39 else 4
    if count < 16 * 39:
        raise DataError(f"{source.folder} holds {count} vectors, too few to train ivfpq: use flat or hnsw")
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, cells, bytes_each, bits, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = index.pq.cp.seed = seed + 1
    index.train(_sample_of(source, min(count, max(_TRAINING_POINTS * cells, 39 * 2**bits)), seed, verify=False))
    return index, {"cells": cells, "code_bytes": bytes_each, "code_bits": bits}


def _tune(
    index: Any, kind: str, queries: np.ndarray, own: bool, folder: Path, wanted: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cheapest search settings that reach the wanted recall, and what was measured.

    Args:
        own: the queries are of the index: each is asked without itself and its copies, which are found easily.
    """
    k = min(RECALL_AT, index.ntotal - own)
    if kind == "flat" or k < 1:
        return {}, {"at": k, "queries": len(queries), "recall": 1.0}
    stored = np.memmap(folder / VECTORS_FILE, np.float16, mode="r", shape=(index.ntotal, index.d))
    copy = _COPY if own else np.inf
    truth, copies = _exact(queries, stored, k, copy)
    if (few := copies <= _COPIES_PASSED).any():
        queries, truth, copies = queries[few], truth[few], copies[few]
    deep = k + min(int(copies.max()), _COPIES_PASSED)
    facts: dict[str, Any] = {"at": k, "queries": len(queries)}
    grid: list[dict[str, Any]] = [{"ef_search": ef} for ef in _EF_SEARCH]
    if kind == "ivfpq":
        probes = [n for n in _NPROBE if n <= index.nlist] or [index.nlist]
        grid = [{"nprobe": n, "rerank": _RERANK} for n in probes]
    tried = []
    for options in grid:
        rows, _ = nearest(index, queries, deep, options, stored if kind == "ivfpq" else None)
        found = 0
        for query, at, best in zip(queries, rows, truth, strict=True):
            cosines = stored[at].astype(np.float32) @ query
            # By cosines, as of pictures that are there twice it is all the same which is found.
            found += int((cosines[cosines < copy][:k] >= best.min() - _AS_NEAR).sum())
        share = found / max(1, int(np.isfinite(truth).sum()))
        tried.append({**options, "recall": round(share, 4)})
        if share >= wanted:
            break
    return options, {**facts, "recall": tried[-1]["recall"], "wanted": wanted, "tried": tried}


def _exact(queries: np.ndarray, stored: np.ndarray, k: int, copy: float) -> tuple[np.ndarray, np.ndarray]:
    """The `k` highest cosines of each query below `copy`, by comparing with all, and how many are not; `stored` in
    blocks."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    copies = np.zeros(len(queries), np.int64)
    for start in range(0, len(stored), 65_536):
        cosines = queries @ stored[start : start + 65_536].astype(np.float32).T  # (Q, block)
        same = cosines >= copy
        copies += same.sum(axis=1)
        cosines[same] = -np.inf
        best = -np.partition(-np.concatenate([best, cosines], axis=1), k - 1, axis=1)[:, :k]
    return best, copies


def _copies(source: Embeddings) -> int:
    """Vectors that stand there `_CROWD` times or more: in a graph their links lead to each other, and a search gets
    stuck among them, however long. Queries that are vectors of the index start beside what they look for, and do not
    show it."""
    weights = np.random.default_rng(0).integers(1, 2**63, source.about.dim, np.uint64)
    blocks = (unit(vectors).astype(np.float16).view(np.uint16) for _, vectors in source.blocks(verify=False))
    keys = np.concatenate([(bits * weights).sum(axis=1) for bits in blocks])
    _, counts = np.unique(keys, return_counts=True)
    return int(counts[counts >= _CROWD].sum())


def _sample_of(source: Embeddings, size: int, seed: int, *, verify: bool) -> np.ndarray:
    """Unit vectors (size, D) of a random choice of rows, in their order."""
    rows = np.sort(np.random.default_rng(seed).choice(len(source), min(size, len(source)), replace=False))
    parts, done = [], 0
    for _, vectors in source.blocks(verify=verify):
        parts.append(unit(vectors[rows[(rows >= done) & (rows < done + len(vectors))] - done]))
        done += len(vectors)
    return np.concatenate(parts)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to unit norm, float32; a row of zeros stays one."""
    vectors = np.asarray(vectors, np.float32)
    return np.ascontiguousarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


class _Items:
    """Writes tables one after the other into a file that can be mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: Any = None

    def __enter__(self) -> _Items:
        return self

    def write(self, table: pa.Table) -> None:
        import pyarrow as pa

        table = table.combine_chunks()
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self.path), table.schema)
        self._writer.write_table(table)

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def described(about: dict[str, Any]) -> dict[str, Any]:
    """The facts of a description that a person wants to see."""
    recall = about["recall"]
    facts = {
        "kind": about["kind"],
        f"{about['of']} indexed": about["count"],
        "dimensions": about["dim"],
        "model": about["model"]["name"],
        **about["parameters"],
        **about["search"],
        f"recall@{recall['at']} of comparing with all": recall["recall"],
        "bytes": sum(one["bytes"] for one in about["files"].values()),
    }
    return facts


def remarks(about: dict[str, Any]) -> Iterator[str]:
    """What a reader should know about the measured recall."""
    if about["recall"].get("wanted", 0) > about["recall"]["recall"]:
        yield f"no setting reached the wanted recall of {about['recall']['wanted']:g}; the most thorough is used"
    if about["copies"] >= _MANY_COPIES * about["count"]:
        many = f"{about['copies']:,} of {about['count']:,} vectors stand there {_CROWD} times or more"
        if about["kind"] == "flat":
            yield f"{many}, and a graph would miss others beside them: a search compares with all instead"
        else:
            yield f"{many}: the graph misses others beside them more often than the recall says; --kind flat does not"
