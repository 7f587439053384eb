"""What caches give, and that nothing is computed twice; `test_segments.py` is about kills, damage and locks."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counting_encoder import DIM, ITEMS, Encoder, check_states, state_of, vectors_of
from trimtab.data.cache import CachedArrays, cache_bytes_needed, cached_arrays, cached_states, cached_vectors
from trimtab.errors import DataError


def test_states_are_computed_once_and_kept(tmp_path: Path) -> None:
    encoder = Encoder()
    check_states(cached_states(tmp_path, ("enc",), ITEMS, encoder.states, chunk=8), ITEMS)
    assert sorted(encoder.seen) == sorted(ITEMS)
    for call in encoder.calls:
        assert [len(text) for text in call] == sorted(map(len, call), reverse=True)
    again = Encoder()
    check_states(cached_states(tmp_path, ("enc",), ITEMS, again.states, chunk=13), ITEMS)
    assert not again.calls
    assert {path.name for path in tmp_path.glob("*/*/*")} == {"states.f16", "lengths.i64", "digests.b16", "meta.json"}
    assert not list(tmp_path.glob("*.part"))


def test_vectors_are_computed_once_and_kept(tmp_path: Path) -> None:
    encoder = Encoder()
    expected = vectors_of(ITEMS)
    for _ in range(2):
        vectors = cached_vectors(tmp_path, ("enc",), ITEMS, encoder.vectors, chunk=8)
        assert vectors.shape == (len(ITEMS), DIM)
        assert vectors.dtype == np.float16
        assert np.array_equal(vectors, expected.astype(np.float16))
        assert not vectors[3].flags.writeable
    assert len(encoder.seen) == len(ITEMS)
    wide = cached_vectors(tmp_path, ("enc",), ITEMS, encoder.vectors, dtype="float32")
    assert np.array_equal(wide, expected)


def test_equal_items_are_computed_and_stored_once(tmp_path: Path) -> None:
    items = [ITEMS[i % 7] for i in range(40)]
    encoder = Encoder()
    check_states(cached_states(tmp_path, ("enc",), items, encoder.states, chunk=3), items)
    assert len(encoder.seen) == 7
    (stored,) = tmp_path.glob("*/*/states.f16")
    assert stored.stat().st_size == sum(len(item) + 2 for item in ITEMS[:7]) * DIM * 2
    vectors = cached_vectors(tmp_path, ("enc",), items, encoder.vectors, chunk=3)
    assert len(encoder.seen) == 14
    assert np.array_equal(vectors, vectors_of(items).astype(np.float16))


def test_a_changed_list_computes_only_what_is_new(tmp_path: Path) -> None:
    lists = [ITEMS[:20], ITEMS[10:30][::-1], ITEMS[5:8], ITEMS, [*ITEMS[::-1], ITEMS[3]]]
    encoder, counts = Encoder(), []
    reports: list[tuple[int, int]] = []
    for items in lists:
        before = len(encoder.seen)
        states = cached_states(
            tmp_path, (), items, encoder.states, chunk=6, progress=lambda *report: reports.append(report)
        )
        check_states(states, items)
        check_states(pickle.loads(pickle.dumps(states)), items)
        assert np.array_equal(cached_vectors(tmp_path, (), items, vectors_of, dtype="float32"), vectors_of(items))
        counts.append(len(encoder.seen) - before)
    assert counts == [20, 10, 0, 20, 0]
    assert reports == [(6, 20), (12, 20), (18, 20), (20, 20), (6, 10), (10, 10), *reports[:4]]
    assert len(list(tmp_path.glob("*/*/states.f16"))) == 3
    # A list that one segment holds does not look at the others.
    assert len(cached_states(tmp_path, (), ITEMS[:20], encoder.states)._rows) == 1


def test_key_parts_tell_caches_apart(tmp_path: Path) -> None:
    encoder = Encoder()
    for parts in (("enc", "a"), ("enc",), ("enca",), ("a", "enc"), ()):
        for dtype in ("float16", "float32"):
            cached_states(tmp_path, parts, ITEMS[:3], encoder.states, dtype=dtype)
            cached_vectors(tmp_path, parts, ITEMS[:3], encoder.vectors, dtype=dtype)
    assert len(encoder.calls) == 20
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 20


def two_segments(folder: Path) -> list[str]:
    """Items of two segments in turn."""
    for items in (ITEMS[:25], ITEMS[25:]):
        cached_states(folder, (), items, Encoder().states)
        cached_vectors(folder, (), items, vectors_of)
    return [item for pair in zip(ITEMS[:25], ITEMS[25:], strict=True) for item in pair]


@pytest.mark.parametrize("segments", [1, 2])
def test_rows_take_any_indices(segments: int, tmp_path: Path) -> None:
    items = two_segments(tmp_path) if segments == 2 else ITEMS
    states = cached_states(tmp_path, (), items, Encoder().states)
    assert len(states._rows) == segments
    batch, mask = states.rows([3, 3, 0])
    assert batch.shape == (3, states.lengths[[3, 0]].max(), DIM)
    assert batch.dtype == np.float16
    assert mask.dtype == bool
    assert np.array_equal(batch[0], batch[1])
    assert states.rows([1], dtype="float32")[0].dtype == np.float32
    empty, mask = states.rows([])
    assert empty.shape == (0, 0, DIM)
    assert mask.shape == (0, 0)
    with pytest.raises(IndexError):
        states.rows([len(items)])
    assert not states[0].flags.writeable
    check_states(pickle.loads(pickle.dumps(states)), items)


@pytest.mark.parametrize("segments", [1, 2])
def test_arrays_are_indexed_like_arrays(segments: int, tmp_path: Path) -> None:
    items = two_segments(tmp_path) if segments == 2 else ITEMS
    arrays = cached_vectors(tmp_path, (), items, vectors_of)
    assert len(arrays._rows) == segments
    expected = vectors_of(items).astype(np.float16)
    for index in (
        *(0, -1, np.int64(7), [3, 3, -1], np.array([[1, 2], [40, 41]]), slice(None, None, -3), np.empty(0, int)),
        expected[:, 0] > 300,
    ):
        assert np.array_equal(arrays[index], expected[index])
        assert arrays[index].dtype == np.float16
    assert np.array_equal(np.asarray(arrays, np.float32), expected.astype(np.float32))
    assert np.array_equal(list(arrays), expected)
    assert np.array_equal(pickle.loads(pickle.dumps(arrays)), expected)
    assert arrays.absent.size == 0
    with pytest.raises(IndexError):
        arrays[len(items)]
    with pytest.raises(ValueError, match="without a copy"):
        np.array(arrays, copy=False)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 4, 2)])
def test_arrays_of_any_fixed_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    def compute(items: list[str]) -> np.ndarray:
        return np.stack([np.full(shape, len(item), np.float32) for item in items])

    for items in (ITEMS[:10], ITEMS):
        arrays = cached_arrays(tmp_path, (), items, compute, chunk=4)
        assert arrays.shape == (len(items), *shape)
        assert np.array_equal(arrays, compute(items))
    assert arrays[5].shape == shape
    assert arrays[[5, 6]].shape == (2, *shape)


class Pictures:
    """Gives nothing for items that are broken."""

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.seen: list[str] = []

    def compute(self, items: list[str]) -> Sequence[np.ndarray | None]:
        self.seen += items
        return [None if item in self.broken else state_of(item).sum(axis=0) for item in items]


def check_present(arrays: CachedArrays, items: list[str], absent: list[int]) -> None:
    assert arrays.absent.tolist() == absent
    present = np.setdiff1d(np.arange(len(items)), absent)
    assert np.array_equal(arrays[present], vectors_of([items[i] for i in present]))


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_items_that_cannot_be_computed_are_absent_and_tried_again_by_the_next_call(chunk: int, tmp_path: Path) -> None:
    items = [*ITEMS[:20], ITEMS[7]]
    reports: list[tuple[int, int]] = []
    first = Pictures(ITEMS[0], ITEMS[7], ITEMS[8])
    arrays = cached_arrays(
        *(tmp_path, (), items, first.compute), dtype="float32", chunk=chunk,
        progress=lambda *report: reports.append(report),
    )  # fmt: skip
    assert sorted(first.seen) == sorted(ITEMS[:20]), "each once"
    assert reports[-1] == (20, 20)
    check_present(arrays, items, [0, 7, 8, 20])
    with pytest.raises(LookupError, match="could not be computed"):
        arrays[[3, 7]]
    with pytest.raises(LookupError, match="could not be computed"):
        arrays[8]
    with pytest.raises(LookupError, match="could not be computed"):
        list(arrays)

    second = Pictures(ITEMS[8])
    arrays = cached_arrays(tmp_path, (), items, second.compute, dtype="float32")
    assert sorted(second.seen) == sorted([ITEMS[0], ITEMS[7], ITEMS[8]])
    check_present(arrays, items, [8])
    check_present(pickle.loads(pickle.dumps(arrays)), items, [8])
    third = Pictures(ITEMS[8])
    check_present(cached_arrays(tmp_path, (), items, third.compute, dtype="float32"), items, [8])
    assert third.seen == [ITEMS[8]]
    assert len(list(tmp_path.glob("*/*/meta.json"))) == 2, "nothing is written of what is absent"
    assert not list(tmp_path.glob("*.part"))


def test_no_item_can_be_computed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 50 items can be computed; the first is 'text 0'"):
        cached_arrays(tmp_path, (), ITEMS, Pictures(*ITEMS).compute)
    for run in (cached_vectors, cached_states):
        with pytest.raises(ValueError, match=r"compute gave|inhomogeneous"):
            run(tmp_path, (), ITEMS, Pictures(ITEMS[3]).compute)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.text(max_size=6), min_size=1, max_size=30), min_size=1, max_size=4),
    st.integers(1, 9),
    st.lists(st.integers(0, 10_000), max_size=9),
)
def test_any_texts_chunks_and_batches(
    tmp_path_factory: pytest.TempPathFactory, lists: list[list[str]], chunk: int, picks: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    encoder = Encoder()
    for items in lists:
        states = cached_states(folder, (), items, encoder.states, chunk=chunk)
        check_states(states, items)
        indices = [pick % len(items) for pick in picks]
        _, mask = states.rows(indices)
        assert mask.sum() == sum(len(items[index]) + 2 for index in indices)
        vectors = cached_vectors(folder, (), items, vectors_of, chunk=chunk, dtype="float32")
        assert np.array_equal(vectors, vectors_of(items))
    assert sorted(encoder.seen) == sorted({text for items in lists for text in items})
    shutil.rmtree(folder)


def test_numbers_that_do_not_fit_are_refused_with_the_text(tmp_path: Path) -> None:
    for value, message in ((np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (1e39, "too large for float32")):

        def compute(texts: list[str], value: float = value) -> list[np.ndarray]:
            return [state_of(text) if text != ITEMS[20] else np.full((2, DIM), value) for text in texts]

        with pytest.raises(DataError, match=message) as caught:
            cached_states(tmp_path, (str(value),), ITEMS, compute, chunk=8)
        assert repr(ITEMS[20]) in str(caught.value)
    encoder = Encoder()
    check_states(cached_states(tmp_path, ("nan",), ITEMS, encoder.states, chunk=8), ITEMS)
    assert len(encoder.seen) == 34, "chunks before the bad one are kept"


def test_what_is_too_large_for_float16_is_kept_in_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def compute(texts: list[str]) -> list[np.ndarray]:
        seen.extend(texts)
        return [state_of(text) * (1e5 if text == ITEMS[20] else 1) for text in texts]

    small = cached_states(tmp_path, (), ITEMS[:8], compute, chunk=8)
    states = cached_states(tmp_path, (), ITEMS, compute, chunk=8)
    assert f"too large for float16 for {ITEMS[20]!r}; keeping the cache in float32" in caplog.text
    for item, found in zip(ITEMS, (states[i] for i in range(len(ITEMS))), strict=True):
        assert found.dtype == np.float32
        assert np.array_equal(found, compute([item])[0].astype(np.float32))
    # Both are found again, each as it was.
    seen.clear()
    again = [cached_states(tmp_path, (), items, compute) for items in (ITEMS[:8], ITEMS)]
    assert not seen
    assert [one[0].dtype for one in again] == [small[0].dtype, states[0].dtype] == [np.float16, np.float32]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "result",
    [
        lambda texts: [state_of("")] * (len(texts) - 1),
        lambda texts: [np.zeros(3)] * len(texts),
        lambda texts: [np.zeros((0, 3))] * len(texts),
        lambda texts: [np.zeros((2, 3 + i % 2)) for i in range(len(texts))],
    ],
)
def test_wrong_results_of_compute_are_bugs(result: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute gave"):
        cached_states(tmp_path, (), ITEMS, result)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compute gave"):
        cached_vectors(tmp_path, (), ITEMS, lambda texts: np.zeros(len(texts)))


def test_the_shape_stays_that_of_the_first_call(tmp_path: Path) -> None:
    cached_vectors(tmp_path, (), ITEMS[:5], vectors_of)
    with pytest.raises(ValueError, match="compute gave"):
        cached_vectors(tmp_path, (), ITEMS, lambda texts: np.zeros((len(texts), DIM + 1)))
    assert np.array_equal(cached_vectors(tmp_path, (), ITEMS, vectors_of, dtype="float32"), vectors_of(ITEMS))


def test_nothing_to_encode(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        cached_states(tmp_path, (), [], Encoder().states)
    with pytest.raises(ValueError, match="float64"):
        cached_states(tmp_path, (), ITEMS, Encoder().states, dtype="float64")
    with pytest.raises(ValueError, match="chunk"):
        cached_states(tmp_path, (), ITEMS, Encoder().states, chunk=0)


def test_bytes_needed_match_the_files(tmp_path: Path) -> None:
    states = cached_states(tmp_path / "s", (), ITEMS, Encoder().states)
    cached_vectors(tmp_path / "v", (), ITEMS, vectors_of, dtype="float32")

    def written(folder: str) -> int:
        return sum(path.stat().st_size for path in (tmp_path / folder).glob("*/*/*") if path.suffix != ".json")

    mean = float(states.lengths.mean())
    assert cache_bytes_needed(len(ITEMS), DIM, tokens_per_item=mean) == written("s")
    assert cache_bytes_needed(len(ITEMS), DIM, dtype="float32") == written("v")
