"""The files of one cache: a folder of segments, each of which is whole and never changes.

    <key>/000001/   rows (`states.f16`, `arrays.f32` ...), `digests.b16`, `meta.json`; of states also `lengths.i64`
    <key>.part/     the same files while they grow, chunk by chunk; `progress.json` says how much of them counts
    <key>.lock      held by the process that fills the cache; others wait and then read

A call that finds all of its items in the segments only reads, without the lock. Otherwise it computes those that are
missing into `<key>.part`, each chunk flushed to disk before `progress.json` counts it, and one rename makes that a
segment. What a killed call leaves behind becomes a segment by the next one. Checksums in `meta.json` are looked at
whenever a segment is used; a damaged one is removed, and its items are missing again.

Segments are never merged. Each filling adds one, so a cache is made for few large lists rather than many small ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from filelock import FileLock, Timeout

from trimtab.errors import DataError, TrimtabError
from trimtab.files import digest_of, explain_disk_errors, write_json

logger = logging.getLogger(__name__)

Compute: TypeAlias = Callable[[list[str]], Sequence[np.ndarray | None]]
"""For n items, rows (T_i >= 1, *shape) of each; `shape` is the same for all. None for an item that has no rows."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called after every chunk with (items done, items in all) of those that this call computes."""

SCHEMA = 2
DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float16": ("f16", np.dtype("<f2")),
    "float32": ("f32", np.dtype("<f4")),
}
DIGEST_BYTES = 16  # of BLAKE2b: two of a billion texts agree with a probability of 1e-21

_DIGEST = np.dtype(f"S{DIGEST_BYTES}")  # sorts fast; zeros at the end do not count, but all have the same length
_BLOCK = 1 << 24  # bytes per checksum
_CHUNK_BYTES = 1 << 28  # of rows as stored, about; while they are computed they take twice as much
_USUAL_SIZE = 2048  # numbers per token, until the first rows tell
_BLOCKS_CHECKED = 64  # of one call's rows, so everything up to 1 GiB; of more an even sample
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Layout:
    """Names and number format of a cache's files.

    Attributes:
        kind: "states" have any number of rows per item, "arrays" one.
    """

    kind: Literal["states", "arrays"]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")

    @property
    def stored(self) -> np.dtype[Any]:
        return DTYPES[self.dtype][1]

    @property
    def rows_file(self) -> str:
        return f"{self.kind}.{DTYPES[self.dtype][0]}"

    @property
    def files(self) -> tuple[str, ...]:
        return (self.rows_file, "digests.b16", *(("lengths.i64",) if self.kind == "states" else ()))


class Segment:
    """Rows of some items, memory-mapped.

    Attributes:
        digests: (n,) of the items.
        offsets: (n + 1,) int64; the rows of item i are `rows[offsets[i] : offsets[i + 1]]`.
        rows: (R, *shape), read-only.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: a file other than that of the rows is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        layout = Layout(meta["kind"], meta["dtype"])
        self._path, self._facts = self.folder / layout.rows_file, meta["files"][layout.rows_file]
        for name in layout.files[1:]:
            _check(self.folder / name, meta["files"][name])
        self.digests = np.fromfile(self.folder / "digests.b16", _DIGEST)
        lengths = np.ones(len(self.digests), np.int64)
        if layout.kind == "states":
            lengths = np.fromfile(self.folder / "lengths.i64", "<i8")
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        shape = (int(self.offsets[-1]), *meta["shape"])
        self.rows = np.memmap(self._path, layout.stored, mode="r", shape=shape).view(
            np.ndarray
        )  # memmap indexes slowly

    def __reduce__(self) -> tuple[type[Segment], tuple[Path]]:
        return Segment, (self.folder,)  # another process maps the files rather than receive a copy

    def check_rows(self, blocks: int) -> None:
        """Compare checksums of the rows, at most so many blocks.

        Raises:
            OSError, ValueError: the file is damaged.
        """
        _check(self._path, self._facts, blocks)


@dataclass(frozen=True)
class Places:
    """Where the rows of N items are: `owners[i]` (an index of `segments`, -1 for none) and its item `rows[i]`."""

    segments: tuple[Segment, ...]
    owners: np.ndarray
    rows: np.ndarray

    def take(self, positions: np.ndarray) -> Places:
        return Places(self.segments, self.owners[positions], self.rows[positions])


def ensure(
    folder: Path,
    layout: Layout,
    key_parts: Sequence[str],
    items: Sequence[str],
    compute: Compute,
    chunk: int,
    progress: Progress | None,
) -> Places:
    """Find every item in the cache of `key_parts`; compute and keep those that are missing.

    Items for which `compute` gives None have no place. Nothing is kept of them, so the next call tries them again.
    Where a value is too large for float16, all items are computed and kept in float32.

    Raises:
        DataError: there are no items, or `compute` gives NaN, infinity or more than float32 can hold.
        TrimtabError: the disk is full or cannot be written.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if not len(items):
        raise DataError("there is nothing to encode: the list is empty")
    order = {item: number for number, item in enumerate(dict.fromkeys(items))}
    digests = item_digests(order)
    key = cache_key(layout, key_parts)
    cache, part = folder / key, folder / f"{key}.part"
    wide = replace(layout, dtype="float32")
    places = _find(cache, digests)
    if (places.owners < 0).any():
        if layout != wide and _begun(folder / cache_key(wide, key_parts)):  # they were too large before
            return ensure(folder, wide, key_parts, items, compute, chunk, progress)
        with explain_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{key}.lock"):
            _recover(part, cache, layout)
            places = _find(cache, digests, mend=True)  # another process may have filled it meanwhile
            missing = places.owners < 0
            if missing.any():
                wanted = [item for item, is_missing in zip(order, missing.tolist(), strict=True) if is_missing]
                shape = places.segments[0].rows.shape[1:] if places.segments else None
                try:
                    filled = _Part(part, layout, shape).fill(wanted, compute, chunk, progress)
                except _TooLarge as error:
                    if layout == wide:
                        raise
                    logger.warning("%s; keeping the cache in float32, which takes twice the space", error)
                    shutil.rmtree(part, ignore_errors=True)
                    return ensure(folder, wide, key_parts, items, compute, chunk, progress)
                if filled:
                    places = _among([*places.segments, _publish(part, cache, layout)], digests)
    return places.take(np.fromiter((order[item] for item in items), np.int64, len(items)))


def cache_key(layout: Layout, key_parts: Sequence[str]) -> str:
    """Hex SHA-256 that names a cache's folder."""
    return digest_of(str(SCHEMA), layout.kind, layout.dtype, *key_parts)


# Reading


def _begun(cache: Path) -> bool:
    return cache.exists() or cache.with_name(f"{cache.name}.part").exists()


def item_digests(items: Iterable[str]) -> np.ndarray:
    values = (hashlib.blake2b(item.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES) for item in items)
    return np.frombuffer(b"".join(value.digest() for value in values), _DIGEST)


def _find(cache: Path, digests: np.ndarray, *, mend: bool = False) -> Places:
    """Look different items up in sound segments; `mend` removes the others."""

    damaged: dict[Path, str] = {}
    places = _look_up(cache, digests, damaged, mend=mend)
    for folder, reason in damaged.items() if mend else ():  # when nothing maps them any more, as Windows wants it
        logger.warning("cache %s is damaged (%s): computing its part again", folder, reason)
        with explain_disk_errors(folder):
            shutil.rmtree(folder)
    return places


def _look_up(cache: Path, digests: np.ndarray, damaged: dict[Path, str], *, mend: bool) -> Places:
    segments: list[Segment] = []
    for folder in sorted(cache.glob("[0-9]*")):
        try:
            segments.append(Segment(folder))
        except UNREADABLE as error:
            damaged[folder] = str(error)
    places = _among(segments, digests)
    if (places.owners < 0).any() and not mend:
        return places  # the caller comes back with the lock
    sound = []
    for segment in places.segments:
        try:
            segment.check_rows(max(1, _BLOCKS_CHECKED // len(places.segments)))
            sound.append(segment)
        except UNREADABLE as error:
            damaged[segment.folder] = str(error)
    return places if len(sound) == len(places.segments) else _among(sound, digests)


def _among(segments: Sequence[Segment], digests: np.ndarray) -> Places:
    """Look different items up in segments; those that hold none of them are left out."""
    counts = [len(segment.digests) for segment in segments]
    known = sum(counts)
    # Sorted together, an item stands right behind the stored one with its digest.
    both = np.concatenate([*(segment.digests for segment in segments), digests])
    order = np.argsort(both, kind="stable")
    pairs = np.flatnonzero((both[order[1:]] == both[order[:-1]]) & (order[1:] >= known))
    numbers = np.full(len(digests), -1)
    numbers[order[pairs + 1] - known] = order[pairs]
    firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    owners = np.searchsorted(firsts, numbers, side="right") - 1
    rows = numbers - firsts[owners]
    used, inverse = np.unique(owners[owners >= 0], return_inverse=True)
    owners[owners >= 0] = inverse
    return Places(tuple(segments[i] for i in used), owners, rows)


def _check(path: Path, facts: dict[str, Any], blocks: int | None = None) -> None:
    if (size := path.stat().st_size) != facts["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes, not {facts['bytes']}")
    count = len(facts["crc32"])
    chosen = list(range(count))
    if blocks is not None and blocks < count:
        chosen = np.linspace(0, count - 1, blocks).astype(int).tolist()
    if _checksums(path, chosen) != [facts["crc32"][block] for block in chosen]:
        raise ValueError(f"{path.name} has other content than was written")


def _checksums(path: Path, blocks: Sequence[int]) -> list[int]:
    result = []
    with path.open("rb") as stream:
        for block in blocks:
            stream.seek(block * _BLOCK)
            result.append(zlib.crc32(stream.read(_BLOCK)))
    return result


# Writing, under the lock


class _TooLarge(DataError):  # noqa: N818 - to callers it is a DataError
    """A finite value that the cache's dtype cannot hold."""


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


class _Part:
    """A new segment while it grows."""

    def __init__(self, folder: Path, layout: Layout, shape: tuple[int, ...] | None) -> None:
        self.folder, self.layout, self.shape = folder, layout, shape
        self.items = self.rows = 0
        self.guessed = 0.0  # tokens of the items so far

    def fill(self, items: list[str], compute: Compute, chunk: int, progress: Progress | None) -> bool:
        """Compute items; whether any has rows. An interrupt or an error loses the current chunk at most."""
        done = 0
        while done < len(items):
            some = self._fitting(items[done : done + chunk])
            kept_some = self._add(some, compute)
            done += len(some)
            if kept_some:
                self._check_space((len(items) - done) * self.items / done)
            if progress is not None:
                progress(done, len(items))
        return self.items > 0

    def _add(self, items: list[str], compute: Compute) -> bool:
        """Compute a chunk and write it; whether any of its items has rows."""
        arrays = self._compute(items, compute)
        kept = [(item, array) for item, array in zip(items, arrays, strict=True) if array is not None]
        if kept:
            rows = self._as_stored(kept)
            lengths = np.array([len(array) for _, array in kept], "<i8")
            self.guessed += sum(_guess_tokens(item) for item, _ in kept)
            with explain_disk_errors(self.folder):
                self._append(rows, item_digests(item for item, _ in kept), lengths)
        return bool(kept)

    def _fitting(self, items: list[str]) -> list[str]:
        """The first of these items, as many as have about `_CHUNK_BYTES` of rows: a long text has hundreds."""
        if self.layout.kind == "arrays":
            return items
        row = math.prod(self.shape or (_USUAL_SIZE,)) * self.layout.stored.itemsize
        per_token = self.rows / self.guessed if self.rows else 1.0
        sizes = np.cumsum([_guess_tokens(item) for item in items]) * (row * per_token)
        return items[: max(1, int(np.searchsorted(sizes, _CHUNK_BYTES, side="right")))]

    def _compute(self, items: list[str], compute: Compute) -> list[np.ndarray | None]:
        # Texts of like length in a batch need little padding; long ones first, so that memory runs out early.
        order = sorted(range(len(items)), key=lambda position: -len(items[position]))
        results = compute([items[position] for position in order])
        if len(results) != len(items):
            raise ValueError(f"compute gave {len(results)} results for {len(items)} items")
        arrays: list[np.ndarray | None] = [None] * len(items)
        for position, array in zip(order, results, strict=True):
            if array is None:
                continue
            self.shape = array.shape[1:] if self.shape is None else self.shape
            if array.size == 0 or array.shape[1:] != self.shape:
                expected = ", ".join(map(str, self.shape))
                raise ValueError(f"compute gave an array of shape {array.shape}, expected (T >= 1, {expected})")
            arrays[position] = array
        return arrays

    def _as_stored(self, kept: list[tuple[str, np.ndarray]]) -> np.ndarray:
        """Rows of a chunk in the cache's dtype, all of them finite."""
        with np.errstate(over="ignore"):  # looked for in the next line
            rows = np.concatenate([array for _, array in kept], dtype=self.layout.stored, casting="unsafe")
        if np.isfinite(rows).all():
            return rows
        for item, array in kept:
            if not np.isfinite(array).all():
                raise DataError(
                    f"the encoder gives NaN or infinity for {item!r}: check the encoder's weights and its dtype"
                )
        largest = max(kept, key=lambda pair: np.abs(pair[1]).max())[0]
        raise _TooLarge(f"the encoder gives values too large for {self.layout.dtype} for {largest!r}")

    def _append(self, rows: np.ndarray, digests: np.ndarray, lengths: np.ndarray) -> None:
        self.folder.mkdir(exist_ok=True)
        for name, values in zip(self.layout.files, (rows, digests, lengths), strict=False):
            with (self.folder / name).open("ab") as stream:
                stream.write(np.ascontiguousarray(values).data)
                stream.flush()
                os.fsync(stream.fileno())
        self.items += len(digests)
        self.rows += len(rows)
        state = {"done": self.items, "rows": self.rows, "shape": self.shape}
        write_json(self.folder / "progress.json", state)

    def _check_space(self, items_left: float) -> None:
        """Better stop after the first chunk than after hours."""
        needed = items_left * (self.folder / self.layout.rows_file).stat().st_size / self.items
        free = shutil.disk_usage(self.folder).free
        if needed * 0.9 > free:  # lengths vary, so the estimate gets some slack
            raise TrimtabError(
                f"cannot write {self.folder}: the cache needs about {needed / 1e9:.1f} GB more, the disk has "
                f"{free / 1e9:.1f} GB: free some space or choose another folder; what is computed is kept"
            )


def _guess_tokens(text: str) -> float:
    """About the tokens of a text in any script, special ones included."""
    return len(text.encode("utf-8", "surrogatepass")) / 4 + 2


def _recover(part: Path, cache: Path, layout: Layout) -> None:
    """Make a segment of what a killed call left behind."""
    if not part.exists():
        return
    try:
        segment = _publish(part, cache, layout)
        logger.info("cache %s: %d items of an interrupted run are kept", cache, len(segment.digests))
    except (ValueError, KeyError, TypeError, FileNotFoundError, RecursionError):
        with explain_disk_errors(part):
            shutil.rmtree(part)


def _publish(part: Path, cache: Path, layout: Layout) -> Segment:
    """Cut a part's files to what progress.json counts, and rename it to the next segment.

    Raises:
        ValueError, KeyError, TypeError, FileNotFoundError: the files do not have what progress.json counts.
        TrimtabError: the disk is full or cannot be written.
    """
    with explain_disk_errors(cache):
        state = json.loads((part / "progress.json").read_text(encoding="utf-8"))
        items, rows, shape = int(state["done"]), int(state["rows"]), [int(size) for size in state["shape"]]
        rows_bytes = rows * int(np.prod(shape)) * layout.stored.itemsize
        files = {}
        for name, size in zip(layout.files, (rows_bytes, items * DIGEST_BYTES, items * 8), strict=False):
            if (part / name).stat().st_size < size:
                raise ValueError(f"{name} is shorter than progress.json says")
            os.truncate(part / name, size)
            files[name] = {"bytes": size, "crc32": _checksums(part / name, range(-(-size // _BLOCK)))}
        facts = {"schema": SCHEMA, "kind": layout.kind, "dtype": layout.dtype}
        write_json(part / "meta.json", {**facts, "items": items, "rows": rows, "shape": shape, "files": files})
        cache.mkdir(exist_ok=True)
        last = max((int(path.name) for path in cache.glob("[0-9]*")), default=0)
        final = part.rename(cache / f"{last + 1:06d}")
        (final / "progress.json").unlink()
    return Segment(final)
