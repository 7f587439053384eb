"""Make an index of an embeddings folder: the kind by its size, settings by measured recall."""

from __future__ import annotations

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
        kind: one of `KINDS`, or "auto" for `choose_kind`.
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
    kind = choose_kind(len(source)) if kind == "auto" else kind
    typical = None if queries is None else _sample_of(_queries_for(source, queries), sample, seed, verify=True)
    with atomic_folder(out, DESCRIPTION_FILE) as built:
        return _build(faiss, source, built, kind, typical, recall, sample, seed, progress or (lambda *_: None))


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
    with _Items(folder / ITEMS_FILE) as items, (folder / VECTORS_FILE).open("wb") as raw:
        for table, vectors in source.blocks():
            vectors = unit(vectors)
            index.add(vectors)
            items.write(table)
            asked.append(vectors[own[(own >= done) & (own < done + len(vectors))] - done])
            vectors.astype(np.float16).tofile(raw)
            done += len(vectors)
            progress(done, len(source))
    stored = np.memmap(folder / VECTORS_FILE, np.float16, mode="r", shape=(len(source), source.about.dim))
    queries = np.concatenate(asked) if typical is None else typical
    options, measured = _tune(index, kind, queries, None if typical is not None else own, stored, recall)
    measured["queries_of"] = "the vectors themselves" if typical is None else "queries"
    with (folder / FAISS_FILE).open("wb") as stream:  # by FAISS itself, not below every path of Windows
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
    if kind != "ivfpq":
        del stored  # Windows deletes no file that is mapped
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
    index: Any, kind: str, queries: np.ndarray, own: np.ndarray | None, stored: np.ndarray, wanted: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cheapest search settings that reach the wanted recall, and what was measured."""
    k = min(RECALL_AT, len(stored) - (own is not None))
    facts: dict[str, Any] = {"at": k, "queries": len(queries)}
    if kind == "flat" or k < 1:
        return {}, {**facts, "recall": 1.0}
    truth = _exact(queries, own, stored, k)
    grid: list[dict[str, Any]] = [{"ef_search": ef} for ef in _EF_SEARCH]
    if kind == "ivfpq":
        probes = [n for n in _NPROBE if n <= index.nlist] or [index.nlist]
        grid = [{"nprobe": n, "rerank": _RERANK} for n in probes]
    tried = []
    for options in grid:
        set_search(index, options)
        rows, _ = nearest(index, queries, k + 1, options, stored if kind == "ivfpq" else None)
        found = [_without(row, None if own is None else own[at])[:k] for at, row in enumerate(rows)]
        share = float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found, truth, strict=True)]))
        tried.append({**options, "recall": round(share, 4)})
        if share >= wanted:
            break
    return options, {**facts, "recall": tried[-1]["recall"], "wanted": wanted, "tried": tried}


def _exact(queries: np.ndarray, own: np.ndarray | None, stored: np.ndarray, k: int) -> list[np.ndarray]:
    """Rows of the `k` nearest of each query by comparing with all, itself aside; `stored` in blocks."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for start in range(0, len(stored), 65_536):
        cosines = queries @ stored[start : start + 65_536].astype(np.float32).T  # (Q, block)
        if own is not None:
            here = (own >= start) & (own < start + cosines.shape[1])
            cosines[np.flatnonzero(here), own[here] - start] = -np.inf
        new = np.argpartition(-cosines, min(k, cosines.shape[1]) - 1, axis=1)[:, :k]  # no need to sort whole blocks
        joined = np.concatenate([best, np.take_along_axis(cosines, new, 1)], axis=1)
        places = np.concatenate([rows, start + new], axis=1)
        chosen = np.argsort(-joined, axis=1, kind="stable")[:, :k]
        best, rows = np.take_along_axis(joined, chosen, 1), np.take_along_axis(places, chosen, 1)
    return list(rows)


def _without(rows: np.ndarray, own: int | None) -> np.ndarray:
    return rows if own is None else rows[rows != own]


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
