"""On-disk caches of what frozen towers give for texts and pictures: computed once, memory-mapped afterwards.

A cache is named by its key parts, such as the tower's fingerprint, layers and precision, so a changed tower never meets
an old cache. Within it every item is found by itself: a list that shares items with an earlier one computes the others
only. Equal items are computed and stored once. Kills, damage and second processes are `trimtab.data.segments`' matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from trimtab.data.segments import DIGEST_BYTES, DTYPES, Layout, Places, Progress, ensure
from trimtab.errors import DataError

__all__ = ["CachedArrays", "PackedStates", "cache_bytes_needed", "cached_arrays", "cached_states", "cached_vectors"]


class PackedStates:
    """Token states of N texts, without padding, memory-mapped.

    Attributes:
        lengths: (N,) int64, tokens of each text.
        dim: D.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._rows = [segment.rows for segment in places.segments]
        self._owners = places.owners
        self._starts = np.empty(len(places.rows), np.int64)
        self.lengths = np.empty(len(places.rows), np.int64)
        for owner, segment in enumerate(places.segments):
            mine = places.owners == owner
            rows = places.rows[mine]
            self._starts[mine] = segment.offsets[rows]
            self.lengths[mine] = segment.offsets[rows + 1] - segment.offsets[rows]
        self.dim: int = self._rows[0].shape[1]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """States (T_i, D) of one text, a read-only view into the file."""
        start = self._starts[index]
        return self._rows[self._owners[index]][start : start + self.lengths[index]]

    def __reduce__(self) -> tuple[type[PackedStates], tuple[Places]]:
        return PackedStates, (self._places,)

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
        states = np.empty((*mask.shape, self.dim), self._rows[0].dtype)
        if len(self._rows) == 1:
            tokens = np.where(mask, starts[:, None] + steps, 0)
            # mode="clip" lets take() write straight into `out`; every index is in range.
            np.take(self._rows[0], tokens.ravel(), axis=0, out=states.reshape(-1, self.dim), mode="clip")
        else:  # text by text, which no number of segments makes slower
            owners = self._owners[positions]
            for row, owner, start, length in zip(states, owners.tolist(), starts.tolist(), lengths.tolist()):
                row[:length] = self._rows[owner][start : start + length]
        states[~mask] = 0
        return (states if dtype is None else states.astype(dtype, copy=False)), mask


class CachedArrays:
    """One array of a fixed shape for each of N items, memory-mapped; indexed along N as an ndarray would be.

    Attributes:
        shape: (N, ...).
        dtype: as stored.
        absent: positions of the items that could not be computed; to index one of them is a LookupError.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._rows = [segment.rows for segment in places.segments]
        self.shape: tuple[int, ...] = (len(places.rows), *self._rows[0].shape[1:])
        self.dtype: np.dtype[Any] = self._rows[0].dtype
        self.absent: np.ndarray = np.flatnonzero(places.owners < 0)

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[type[CachedArrays], tuple[Places]]:
        return CachedArrays, (self._places,)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> np.ndarray: ...
    def __getitem__(self, index: Any) -> np.ndarray:
        """(...) of one position, a read-only view; or (B, ...) of several (numbers, a mask or a slice), a copy."""
        owners, rows = self._places.owners[index], self._places.rows[index]
        if np.any(owners < 0):
            # An IndexError would end a loop over the items in silence.
            raise LookupError(f"{index!r} names items that could not be computed: leave out those in `absent`")
        if np.ndim(rows) == 0:
            return self._rows[owners][rows]
        if len(self._rows) == 1:
            return self._rows[0].take(rows, axis=0)
        gathered = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        for owner, stored in enumerate(self._rows):
            mine = owners == owner
            gathered[mine] = stored.take(rows[mine], axis=0)
        return gathered

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it in memory."""
        if copy is False:
            raise ValueError("a cache cannot become an array without a copy")
        return self[:].astype(dtype or self.dtype, copy=False)


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
    """Token states of every text, from disk if they are there, else computed and kept.

    Args:
        folder: holds the caches of all keys.
        key_parts: what else the states depend on: fingerprint of the encoder, layers, prefix ...
        items: N texts.
        compute: gives for n texts, long ones first, n arrays (T_i, D) with T_i >= 1.
        dtype: "float16" or "float32" on disk; float32 also where a value is too large for float16.
        chunk: texts per call of `compute`, fewer where their states would take more than about 256 MB; at most this
            much work is lost by a kill.
        progress: told about every finished chunk.

    Raises:
        DataError: there are no items, or `compute` gives NaN, infinity or more than float32 can hold.
        TrimtabError: the disk is full or cannot be written.
    """

    def compute_states(texts: list[str]) -> list[np.ndarray]:
        states = [np.asarray(one) for one in compute(texts)]
        if wrong := [one.shape for one in states if one.ndim != 2]:
            raise ValueError(f"compute gave an array of shape {wrong[0]}, expected (T, D)")
        return states

    layout = Layout("states", dtype)
    return PackedStates(ensure(Path(folder), layout, key_parts, items, compute_states, chunk, progress))


def cached_vectors(
    folder: str | Path,
    key_parts: Sequence[str],
    items: Sequence[str],
    compute: Callable[[list[str]], np.ndarray],
    *,
    dtype: str = "float16",
    chunk: int = 4096,
    progress: Progress | None = None,
) -> CachedArrays:
    """One vector (D,) per item: `cached_arrays` where `compute` gives an array (n, D) and no item is absent."""

    def compute_vectors(some: list[str]) -> np.ndarray:
        vectors = np.asarray(compute(some))
        if vectors.ndim != 2:
            raise ValueError(f"compute gave an array of shape {vectors.shape}, expected (n, D)")
        return vectors

    return cached_arrays(folder, key_parts, items, compute_vectors, dtype=dtype, chunk=chunk, progress=progress)


def cached_arrays(
    folder: str | Path,
    key_parts: Sequence[str],
    items: Sequence[str],
    compute: Callable[[list[str]], np.ndarray | Sequence[np.ndarray | None]],
    *,
    dtype: str = "float16",
    chunk: int = 512,
    progress: Progress | None = None,
) -> CachedArrays:
    """One array of a fixed shape per item, from disk if they are there, else computed and kept.

    Args:
        folder: holds the caches of all keys.
        key_parts: what else the arrays depend on: fingerprint of the tower, pooling, template, view ...
        items: N texts, or names of other things that change with their content (for a picture say its path, size and
            time of change).
        compute: gives for n items an array (n, ...), or a list of n arrays of one shape with None for each item that
            cannot be computed, say a corrupt picture. Such an item is absent from the result, and nothing is kept of
            it: this call does not try it again, the next one does.
        dtype: "float16" or "float32" on disk; float32 also where a value is too large for float16.
        chunk: items per call of `compute`; at most this much work is lost by a kill.
        progress: told about every finished chunk.

    Raises:
        DataError: there are no items, none can be computed, or `compute` gives NaN, infinity or more than float32
            can hold.
        TrimtabError: the disk is full or cannot be written.
    """

    def compute_rows(some: list[str]) -> list[np.ndarray | None]:
        return [None if array is None else np.asarray(array)[None] for array in compute(some)]

    places = ensure(Path(folder), Layout("arrays", dtype), key_parts, items, compute_rows, chunk, progress)
    if not places.segments:
        raise DataError(f"none of the {len(items)} items can be computed; the first is {items[0]!r}")
    return CachedArrays(places)


def cache_bytes_needed(items: int, dim: int, *, tokens_per_item: float | None = None, dtype: str = "float16") -> int:
    """Bytes on disk of a cache of vectors, or of token states when `tokens_per_item` is given."""
    size = dim * DTYPES[dtype][1].itemsize
    if tokens_per_item is None:
        return items * (size + DIGEST_BYTES)
    return round(items * tokens_per_item) * size + items * (DIGEST_BYTES + 8)
