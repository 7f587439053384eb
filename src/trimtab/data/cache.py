"""On-disk caches of what frozen towers give for texts: computed once, memory-mapped afterwards.

A cache is a folder named by the SHA-256 of what went in (key parts such as the tower's fingerprint, and
the items), so a changed tower or text never meets an old cache. It appears by one rename when it is whole.
Until then it is `<key>.part`, where rows are appended chunk by chunk, each chunk flushed to disk before
`progress.json` counts it: after a kill the next run cuts off what is not counted and goes on from there. One
lock per key makes a second process wait and then read. Equal items are computed and stored once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from filelock import FileLock, Timeout

from trimtab.errors import DataError, TrimtabError
from trimtab.files import digest_of, explain_disk_errors, write_json

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (items done, items in all) after every chunk."""

SCHEMA = 1
_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float16": ("f16", np.dtype("<f2")),
    "float32": ("f32", np.dtype("<f4")),
}
_WORK_FILES = ("progress.json", "lengths.i64", "rows")
_BLOCK = 1 << 24  # bytes per checksum
_BLOCKS_CHECKED = 64  # the whole file up to 1 GiB; of larger ones an even sample


class PackedStates:
    """Token states of N texts, without padding, memory-mapped.

    Files of `folder`: `states.f16` (stored tokens, D); `offsets.i64` (U + 1), where the states of each of the
    U different texts begin and end; `texts.i64` (N), which of them each text is; `meta.json`.

    Attributes:
        folder: where the files are.
        lengths: (N,) int64, tokens of each text.
        dim: D.
        total_tokens: tokens of all N texts.
        nbytes: bytes of the states on disk; equal texts are stored once.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        suffix, dtype = _DTYPES[meta["dtype"]]
        self.dim: int = meta["dim"]
        offsets = np.fromfile(self.folder / "offsets.i64", "<i8")
        texts = np.fromfile(self.folder / "texts.i64", "<i8")
        self._starts = offsets[texts]
        self.lengths = offsets[texts + 1] - self._starts
        self.total_tokens = int(self.lengths.sum())
        stored = np.memmap(self.folder / f"states.{suffix}", dtype, mode="r", shape=(meta["rows"], self.dim))
        self.nbytes = int(stored.nbytes)
        self._states = stored.view(np.ndarray)  # np.memmap makes every indexing slower

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """States (T_i, D) of one text, a read-only view into the file."""
        start = self._starts[index]
        return self._states[start : start + self.lengths[index]]

    def __reduce__(self) -> tuple[type[PackedStates], tuple[Path]]:
        return PackedStates, (self.folder,)  # a worker process maps the files rather than receive a copy

    def rows(self, indices: Sequence[int] | np.ndarray, *, dtype: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Gather a batch.

        Args:
            indices: (B,) positions of texts, in any order, repeats allowed.
            dtype: "float32" or "float16"; as stored by default.

        Returns:
            states (B, T, D), zero where padded, T the longest of the batch; and mask (B, T), True on tokens.
        """
        positions = np.asarray(indices, dtype=np.int64)
        starts, lengths = self._starts[positions], self.lengths[positions]
        steps = np.arange(lengths.max(initial=0))
        mask = steps < lengths[:, None]  # (B, T)
        tokens = np.where(mask, starts[:, None] + steps, 0)
        states = np.empty((*tokens.shape, self.dim), self._states.dtype)
        # mode="clip" lets take() write straight into `out`; every index is in range.
        np.take(self._states, tokens.ravel(), axis=0, out=states.reshape(-1, self.dim), mode="clip")
        states[~mask] = 0
        return (states if dtype is None else states.astype(dtype, copy=False)), mask


def cached_states(
    folder: str | Path,
    key_parts: Sequence[str],
    items: Sequence[str],
    compute: Callable[[list[str]], list[np.ndarray]],
    *,
    dtype: str = "float16",
    chunk: int = 2048,
    progress: Progress | None = None,
) -> PackedStates:
    """Token states of every item, from disk if they are there, else computed and kept.

    Args:
        folder: holds the caches of all keys.
        key_parts: what else the states depend on: fingerprint of the encoder, layers, prefix ...
        items: N texts.
        compute: gives for n texts, long ones first, n arrays (T_i, D) with T_i >= 1.
        dtype: "float16" or "float32" on disk.
        chunk: texts per call of `compute`; at most this much work is lost by a kill.
        progress: told about every finished chunk.

    Raises:
        DataError: when there are no items, or `compute` gives NaN, infinity or more than `dtype` can hold.
        TrimtabError: when the disk is full or cannot be written.
    """
    return PackedStates(_ensure(Path(folder), "states", key_parts, items, compute, dtype, chunk, progress))


def cached_vectors(
    folder: str | Path,
    key_parts: Sequence[str],
    items: Sequence[str],
    compute: Callable[[list[str]], np.ndarray],
    *,
    dtype: str = "float16",
    chunk: int = 4096,
    progress: Progress | None = None,
) -> np.memmap:
    """One vector per item, from disk if they are there, else computed and kept.

    Args:
        folder: holds the caches of all keys.
        key_parts: what else the vectors depend on: fingerprint of the tower, pooling, template ...
        items: N texts.
        compute: gives for n texts, long ones first, an array (n, D).
        dtype: "float16" or "float32" on disk.
        chunk: texts per call of `compute`; at most this much work is lost by a kill.
        progress: told about every finished chunk.

    Returns:
        (N, D), read-only, in the order of `items`.

    Raises:
        DataError: when there are no items, or `compute` gives NaN, infinity or more than `dtype` can hold.
        TrimtabError: when the disk is full or cannot be written.
    """

    def compute_rows(texts: list[str]) -> list[np.ndarray]:
        vectors = np.asarray(compute(texts))
        if vectors.ndim != 2:
            raise ValueError(f"compute gave an array of shape {vectors.shape}, expected (n, D)")
        return [row[None] for row in vectors]

    ready = _ensure(Path(folder), "vectors", key_parts, items, compute_rows, dtype, chunk, progress)
    meta = _read_meta(ready)
    suffix, on_disk = _DTYPES[dtype]
    return np.memmap(ready / f"vectors.{suffix}", on_disk, mode="r", shape=(meta["rows"], meta["dim"]))


def cache_bytes_needed(items: int, dim: int, *, tokens_per_item: float | None = None, dtype: str = "float16") -> int:
    """Bytes on disk of a cache of vectors, or of token states when `tokens_per_item` is given."""
    size = _DTYPES[dtype][1].itemsize
    if tokens_per_item is None:
        return items * dim * size
    return round(items * tokens_per_item) * dim * size + (2 * items + 1) * 8


def cache_key(kind: str, dtype: str, key_parts: Sequence[str], items: Sequence[str]) -> str:
    """Hex SHA-256 that names the cache folder."""
    head = (str(SCHEMA), kind, dtype, str(len(key_parts)), *key_parts)
    return digest_of(*head, *(item.encode("utf-8", "surrogatepass") for item in items))


def _ensure(
    folder: Path,
    kind: str,
    key_parts: Sequence[str],
    items: Sequence[str],
    compute: Callable[[list[str]], list[np.ndarray]],
    dtype: str,
    chunk: int,
    progress: Progress | None,
) -> Path:
    """Folder of the finished cache, which this or another process fills if need be."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if not len(items):
        raise DataError("there is nothing to encode: the list of texts is empty")
    key = cache_key(kind, dtype, key_parts, items)
    final, part = folder / key, folder / f"{key}.part"
    if final.is_dir() and not _damage(final):
        return final
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{key}.lock"):
        if final.is_dir():  # another process finished it meanwhile, or it is damaged
            if not (damage := _damage(final)):
                return final
            logger.warning("cache %s is damaged (%s): computing it again", final, damage)
            with explain_disk_errors(final):
                shutil.rmtree(final)
        if _damage(part):  # not there, or not whole; else a kill came just before the rename
            writer = _Writer(part, kind, dtype, items)
            writer.fill(compute, chunk, progress)
            writer.finish(key)
        with explain_disk_errors(final):
            for name in _WORK_FILES:
                (part / name).unlink(missing_ok=True)
            part.rename(final)
    return final


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    with explain_disk_errors(path):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.warning("another process is filling the cache %s: waiting for it", path.with_suffix(""))
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Writer:
    """Fills one `.part` folder; its rows file is in the final form unless repeats must be written out."""

    def __init__(self, part: Path, kind: str, dtype: str, items: Sequence[str]) -> None:
        self.part = part
        self.kind = kind
        self.dtype_name = dtype
        suffix, self.dtype = _DTYPES[dtype]
        first = {item: position for position, item in enumerate(dict.fromkeys(items))}
        self.unique = list(first)
        self.texts = np.fromiter((first[item] for item in items), np.int64, len(items))
        self.main = part / f"{kind}.{suffix}"
        self.expands = kind == "vectors" and len(self.unique) < len(items)
        self.rows_path = part / "rows" if self.expands else self.main
        self.lengths_path = part / "lengths.i64"
        self.done = self.rows = self.dim = 0
        with explain_disk_errors(part):
            self._resume()

    def _resume(self) -> None:
        """Go back to what progress.json counts, or to an empty folder."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads((self.part / "progress.json").read_text(encoding="utf-8"))
            done, rows, dim = int(state["done"]), int(state["rows"]), int(state["dim"])
            rows_bytes = rows * dim * self.dtype.itemsize
            whole = self.rows_path.stat().st_size >= rows_bytes and self.lengths_path.stat().st_size >= done * 8
            if whole and 0 < done <= len(self.unique):
                os.truncate(self.rows_path, rows_bytes)
                os.truncate(self.lengths_path, done * 8)
                self.done, self.rows, self.dim = done, rows, dim
                logger.info("cache %s: %d of %d texts are there already", self.part, done, len(self.unique))
                return
        if self.part.exists():
            shutil.rmtree(self.part)
        self.part.mkdir()

    def fill(self, compute: Callable[[list[str]], list[np.ndarray]], chunk: int, progress: Progress | None) -> None:
        """Compute what is missing. An interrupt or an error loses the current chunk at most."""
        while self.done < len(self.unique):
            texts = self.unique[self.done : self.done + chunk]
            rows, lengths = self._compute(texts, compute)
            with explain_disk_errors(self.part):
                self._append(rows, lengths)
            self._check_space()
            if progress is not None:
                progress(self.done, len(self.unique))

    def _compute(
        self, texts: list[str], compute: Callable[[list[str]], list[np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows (sum of T_i, D) as stored, and lengths (n,), in the order of `texts`."""
        # Texts of like length in a batch need little padding; long ones first, so that memory runs out early.
        order = sorted(range(len(texts)), key=lambda position: -len(texts[position]))
        results = compute([texts[position] for position in order])
        if len(results) != len(texts):
            raise ValueError(f"compute gave {len(results)} results for {len(texts)} texts")
        arrays: list[np.ndarray] = [np.empty(0)] * len(texts)
        for position, result in zip(order, results):
            arrays[position] = np.asarray(result)
        self.dim = self.dim or arrays[0].shape[-1]
        for array in arrays:
            if array.ndim != 2 or len(array) == 0 or array.shape[1] != self.dim:
                raise ValueError(f"compute gave an array of shape {array.shape}, expected (T >= 1, {self.dim})")
        lengths = np.array([len(array) for array in arrays])
        with np.errstate(over="ignore"):  # looked for in the next line
            rows = np.concatenate(arrays).astype(self.dtype)
        if not np.isfinite(rows).all():
            bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            position = int(np.searchsorted(np.cumsum(lengths), bad, side="right"))
            fits = np.isfinite(arrays[position]).all()
            what = f"values too large for {self.dtype_name}" if fits else "NaN or infinity"
            remedy = "use float32 for the cache" if fits else "check the encoder's weights and its dtype"
            raise DataError(f"the encoder gives {what} for the text {texts[position]!r}: {remedy}")
        return rows, lengths

    def _append(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        for path, values in ((self.rows_path, rows), (self.lengths_path, lengths)):
            _write_flushed(path, "ab", [values])
        self.done += len(lengths)
        self.rows += len(rows)
        write_json(self.part / "progress.json", {"done": self.done, "rows": self.rows, "dim": self.dim})

    def _check_space(self) -> None:
        """Better stop after the first chunk than after hours."""
        per_text = self.rows / self.done * self.dim * self.dtype.itemsize
        needed = per_text * (len(self.unique) - self.done + (len(self.texts) if self.expands else 0))
        free = shutil.disk_usage(self.part).free
        if needed * 0.9 > free:  # lengths vary, so the estimate gets some slack
            raise TrimtabError(
                f"cannot write {self.part}: the cache needs about {needed / 1e9:.1f} GB more, the disk has "
                f"{free / 1e9:.1f} GB: free some space or choose another folder; what is computed is kept"
            )

    def finish(self, key: str) -> None:
        """Write the other files; meta.json, the last, makes the folder whole."""
        with explain_disk_errors(self.part):
            paths = [self.main]
            if self.kind == "states":
                lengths = np.fromfile(self.lengths_path, "<i8")
                index = {"offsets.i64": np.concatenate([[0], np.cumsum(lengths)]), "texts.i64": self.texts}
                for name, values in index.items():
                    _write_flushed(self.part / name, "wb", [values])
                    paths.append(self.part / name)
            elif self.expands:
                stored = np.memmap(self.rows_path, self.dtype, mode="r", shape=(self.rows, self.dim))
                step = 1 << 16
                blocks = (stored[self.texts[start : start + step]] for start in range(0, len(self.texts), step))
                _write_flushed(self.main, "wb", blocks)
            meta = {
                "schema": SCHEMA,
                "kind": self.kind,
                "key": key,
                "dtype": self.dtype_name,
                "items": len(self.texts),
                "rows": len(self.texts) if self.kind == "vectors" else self.rows,
                "dim": self.dim,
                "files": {p.name: {"bytes": p.stat().st_size, "crc32": _checksums(p)} for p in paths},
            }
            write_json(self.part / "meta.json", meta)


def _write_flushed(path: Path, mode: Literal["ab", "wb"], blocks: Iterable[np.ndarray]) -> None:
    with path.open(mode) as stream:
        for block in blocks:
            if block.dtype.kind == "i":
                block = block.astype("<i8")
            stream.write(np.ascontiguousarray(block).data)
        stream.flush()
        os.fsync(stream.fileno())


def _read_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def _damage(folder: Path) -> str:
    """What is wrong with a finished cache, or ""."""
    try:
        for name, facts in _read_meta(folder)["files"].items():
            path = folder / name
            if (size := path.stat().st_size) != facts["bytes"]:
                return f"{name} has {size} bytes, not {facts['bytes']}"
            blocks = range(len(facts["crc32"]))
            if len(blocks) > _BLOCKS_CHECKED:
                blocks_checked = np.linspace(0, len(blocks) - 1, _BLOCKS_CHECKED).astype(int).tolist()
            else:
                blocks_checked = list(blocks)
            if _checksums(path, blocks_checked) != [facts["crc32"][block] for block in blocks_checked]:
                return f"{name} has other content than was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _checksums(path: Path, blocks: Iterable[int] | None = None) -> list[int]:
    """CRC-32 of some blocks of a file, of all by default."""
    if blocks is None:
        blocks = range(-(-path.stat().st_size // _BLOCK))
    result = []
    with path.open("rb") as stream:
        for block in blocks:
            stream.seek(block * _BLOCK)
            result.append(zlib.crc32(stream.read(_BLOCK)))
    return result
