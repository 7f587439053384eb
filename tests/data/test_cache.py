from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data import cache
from trimtab.data.cache import PackedStates, cache_bytes_needed, cached_states, cached_vectors
from trimtab.errors import DataError, TrimtabError

DIM = 5


def state_of(text: str) -> np.ndarray:
    """(len + 2, DIM), exact in float16 and different for every text used here."""
    codes = np.array([1, *map(ord, text), 2], np.float32) % 2048
    return codes[:, None] + np.arange(DIM, dtype=np.float32) / 2 * (codes[:, None] < 512)


class Encoder:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    @property
    def seen(self) -> list[str]:
        return [text for call in self.calls for text in call]

    def states(self, texts: list[str]) -> list[np.ndarray]:
        self.calls.append(texts)
        return [state_of(text) for text in texts]

    def vectors(self, texts: list[str]) -> np.ndarray:
        self.calls.append(texts)
        return np.stack([state_of(text).sum(axis=0) for text in texts])


def check_states(states: PackedStates, items: list[str]) -> None:
    assert len(states) == len(items)
    assert states.lengths.tolist() == [len(item) + 2 for item in items]
    assert states.total_tokens == states.lengths.sum()
    indices = np.random.default_rng(0).permutation(len(items))
    batch, mask = states.rows(indices)
    for row, keep, index in zip(batch, mask, indices):
        assert np.array_equal(row[keep], state_of(items[index]))
        assert not row[~keep].any()
        assert np.array_equal(states[index], state_of(items[index]))


ITEMS = [f"text {i}" + "x" * (i * 7 % 11) for i in range(50)]


def test_states_are_computed_once_and_kept(tmp_path: Path) -> None:
    encoder = Encoder()
    check_states(cached_states(tmp_path, ("enc",), ITEMS, encoder.states, chunk=8), ITEMS)
    assert sorted(encoder.seen) == sorted(ITEMS)
    for call in encoder.calls:
        assert [len(text) for text in call] == sorted(map(len, call), reverse=True)
    again = Encoder()
    check_states(cached_states(tmp_path, ("enc",), ITEMS, again.states, chunk=13), ITEMS)
    assert not again.calls
    assert not list(tmp_path.glob("*.part"))


def test_vectors_are_computed_once_and_kept(tmp_path: Path) -> None:
    encoder = Encoder()
    expected = np.stack([state_of(item).sum(axis=0) for item in ITEMS])
    for _ in range(2):
        vectors = cached_vectors(tmp_path, ("enc",), ITEMS, encoder.vectors, chunk=8)
        assert isinstance(vectors, np.memmap)
        assert vectors.dtype == np.float16
        assert np.array_equal(vectors, expected.astype(np.float16))
        assert not vectors.flags.writeable
    assert len(encoder.seen) == len(ITEMS)
    wide = cached_vectors(tmp_path, ("enc",), ITEMS, encoder.vectors, dtype="float32")
    assert np.array_equal(wide, expected)


def test_equal_items_are_computed_and_stored_once(tmp_path: Path) -> None:
    items = [ITEMS[i % 7] for i in range(40)]
    encoder = Encoder()
    states = cached_states(tmp_path, ("enc",), items, encoder.states, chunk=3)
    check_states(states, items)
    assert len(encoder.seen) == 7
    assert states.nbytes == sum(len(item) + 2 for item in ITEMS[:7]) * DIM * 2
    vectors = cached_vectors(tmp_path, ("enc",), items, encoder.vectors, chunk=3)
    assert len(encoder.seen) == 14
    assert np.array_equal(vectors, np.stack([state_of(item).sum(axis=0) for item in items]).astype(np.float16))
    assert {path.suffix for path in tmp_path.glob("*/*")} == {".f16", ".i64", ".json"}, "no work files are left"


def test_key_tells_everything_apart(tmp_path: Path) -> None:
    encoder = Encoder()
    base = dict.fromkeys(
        [
            cached_states(tmp_path, parts, items, encoder.states, dtype=dtype).folder
            for parts, items, dtype in (
                (("enc", "a"), ["b", "c"], "float16"),
                (("enc",), ["a", "b", "c"], "float16"),
                (("enca",), ["b", "c"], "float16"),
                (("enc", "a"), ["c", "b"], "float16"),
                (("enc", "a"), ["bc"], "float16"),
                (("enc", "a"), ["b", "c"], "float32"),
            )
        ]
    )
    assert len(base) == 6
    assert len(encoder.calls) == 6


def test_rows_take_any_indices(tmp_path: Path) -> None:
    states = cached_states(tmp_path, (), ITEMS, Encoder().states)
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
        states.rows([len(ITEMS)])
    check_states(pickle.loads(pickle.dumps(states)), ITEMS)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.text(max_size=6), min_size=1, max_size=30),
    st.integers(1, 9),
    st.lists(st.integers(0, 10_000), max_size=9),
)
def test_any_texts_chunks_and_batches(
    tmp_path_factory: pytest.TempPathFactory, items: list[str], chunk: int, picks: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    states = cached_states(folder, (), items, Encoder().states, chunk=chunk)
    check_states(states, items)
    _, mask = states.rows([pick % len(items) for pick in picks])
    assert mask.sum() == sum(len(items[pick % len(items)]) + 2 for pick in picks)
    vectors = cached_vectors(folder, (), items, Encoder().vectors, chunk=chunk, dtype="float32")
    assert np.array_equal(vectors, np.stack([state_of(item).sum(axis=0) for item in items]))
    shutil.rmtree(folder)


KILLED = """
import os, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_cache import ITEMS, Encoder
from trimtab.data.cache import cached_states, cached_vectors
items, encoder = ITEMS + ITEMS[:9], Encoder()
def compute(kind):
    def call(texts):
        if len(encoder.calls) == 3:
            os._exit(9)
        return getattr(encoder, kind)(texts)
    return call
if sys.argv[3] == "states":
    cached_states(sys.argv[1], ("k",), items, compute("states"), chunk=8)
else:
    cached_vectors(sys.argv[1], ("k",), items, compute("vectors"), chunk=8)
"""


@pytest.mark.parametrize("kind", ["states", "vectors"])
def test_kill_half_way_costs_one_chunk(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent), kind]
    assert subprocess.run(command, check=False).returncode == 9
    (part,) = tmp_path.glob("*.part")
    with max(part.iterdir(), key=lambda path: path.stat().st_size).open("ab") as stream:
        stream.write(b"half a row that progress.json does not count")
    items, encoder = ITEMS + ITEMS[:9], Encoder()
    reports: list[tuple[int, int]] = []
    options = {"chunk": 20, "progress": lambda done, total: reports.append((done, total))}
    if kind == "states":
        check_states(cached_states(tmp_path, ("k",), items, encoder.states, **options), items)
    else:
        vectors = cached_vectors(tmp_path, ("k",), items, encoder.vectors, **options)
        assert np.array_equal(vectors, np.stack([state_of(item).sum(axis=0) for item in items]).astype(np.float16))
    assert sorted(encoder.seen) == sorted(ITEMS[24:])
    assert reports == [(44, 50), (50, 50)]


@pytest.mark.parametrize("moment", ["_checksums", "write_json", "rename"])
@pytest.mark.parametrize("kind", ["states", "vectors"])
def test_kill_while_finishing_loses_nothing(
    kind: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KillError(BaseException):
        pass

    def die(*args: object, **_: object) -> None:
        if moment != "write_json" or Path(str(args[0])).name == "meta.json":
            raise KillError
        json_writer(*args)

    items, encoder = ITEMS + ITEMS[:9], Encoder()
    run = {"states": cached_states, "vectors": cached_vectors}[kind]
    json_writer = cache.write_json
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "rename") if moment == "rename" else (cache, moment)), die)
        with pytest.raises(KillError):
            run(tmp_path, (), items, getattr(encoder, kind), chunk=16)
    assert len(encoder.seen) == 50
    assert len(run(tmp_path, (), items, getattr(encoder, kind), chunk=16)) == 59
    assert len(encoder.seen) == 50, "nothing is computed twice"
    result = run(tmp_path, (), items, getattr(encoder, kind))
    if kind == "states":
        check_states(result, items)
    else:
        assert np.array_equal(result, np.stack([state_of(item).sum(axis=0) for item in items]).astype(np.float16))


@pytest.mark.parametrize("broken", ["progress.json", "rows", "lengths.i64"])
def test_damaged_part_starts_anew(broken: str, tmp_path: Path) -> None:
    def fail(texts: list[str]) -> np.ndarray:
        if len(encoder.calls) == 3:
            raise KeyboardInterrupt
        return encoder.vectors(texts)

    items, encoder = ITEMS + ITEMS[:2], Encoder()
    with pytest.raises(KeyboardInterrupt):
        cached_vectors(tmp_path, (), items, fail, chunk=8)
    (part,) = tmp_path.glob("*.part")
    with (part / broken).open("rb+") as stream:
        stream.truncate(7)
    fresh = Encoder()
    assert len(cached_vectors(tmp_path, (), items, fresh.vectors, chunk=8)) == 52
    assert len(fresh.seen) == 50


def fill_slowly(folder: str, log: str) -> None:
    def compute(texts: list[str]) -> list[np.ndarray]:
        time.sleep(0.02)
        with Path(log).open("a") as stream:
            stream.write("".join(f"{text}\n" for text in texts))
        return [state_of(text) for text in texts]

    check_states(cached_states(folder, ("two",), ITEMS, compute, chunk=10), ITEMS)


def test_two_processes_compute_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [context.Process(target=fill_slowly, args=(str(tmp_path / "c"), str(log))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(log.read_text().splitlines()) == sorted(ITEMS)


def test_two_threads_compute_once_and_the_second_says_that_it_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, inside, go = Encoder(), threading.Event(), threading.Event()

    def compute(texts: list[str]) -> list[np.ndarray]:
        inside.set()
        assert go.wait(10)
        return encoder.states(texts)

    threads = [threading.Thread(target=cached_states, args=(tmp_path, (), ITEMS, compute)) for _ in range(2)]
    threads[0].start()
    assert inside.wait(10)
    with caplog.at_level(logging.WARNING):
        threads[1].start()
        deadline = time.monotonic() + 10
        while "waiting" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        go.set()
        for thread in threads:
            thread.join(10)
    assert "waiting" in caplog.text
    assert len(encoder.seen) == len(ITEMS)


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def damage_remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", ["states.f16", "offsets.i64", "texts.i64", "meta.json"])
@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove])
def test_damage_is_seen_and_mended(damage: object, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = cached_states(tmp_path, (), ITEMS, Encoder().states)
    damage(states.folder / name)  # type: ignore[operator]
    encoder = Encoder()
    with caplog.at_level(logging.WARNING):
        check_states(cached_states(tmp_path, (), ITEMS, encoder.states), ITEMS)
    assert "damaged" in caplog.text
    assert len(encoder.seen) == len(ITEMS)


def test_damage_in_large_files_is_looked_for_by_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_BLOCK", 16)
    monkeypatch.setattr(cache, "_BLOCKS_CHECKED", 4)
    states = cached_states(tmp_path, (), ITEMS, Encoder().states)
    for position in (0, -1):
        data = bytearray((states.folder / "states.f16").read_bytes())
        data[position] ^= 1
        (states.folder / "states.f16").write_bytes(data)
        assert "other content" in cache._damage(states.folder)
        states = cached_states(tmp_path, (), ITEMS, Encoder().states)
        assert not cache._damage(states.folder)


def test_numbers_that_do_not_fit_are_refused_with_the_text(tmp_path: Path) -> None:
    def with_value(value: float) -> Callable[[list[str]], list[np.ndarray]]:
        def compute(texts: list[str]) -> list[np.ndarray]:
            return [state_of(text) if text != ITEMS[20] else state_of(text) * 0 + value for text in texts]

        return compute

    for value, message in (
        (np.nan, "NaN or infinity"),
        (np.inf, "NaN or infinity"),
        (1e5, "too large for float16"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            cached_states(tmp_path, (str(value),), ITEMS, with_value(value), chunk=8)
        assert repr(ITEMS[20]) in str(caught.value)
    cached_states(tmp_path, (), ITEMS, with_value(1e5), dtype="float32")
    encoder = Encoder()
    cached_states(tmp_path, ("nan",), ITEMS, encoder.states, chunk=8)
    assert len(encoder.seen) == 34, "chunks before the bad one are kept"


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


def test_nothing_to_encode(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        cached_states(tmp_path, (), [], Encoder().states)
    with pytest.raises(ValueError, match="float64"):
        cached_states(tmp_path, (), ITEMS, Encoder().states, dtype="float64")
    with pytest.raises(ValueError, match="chunk"):
        cached_states(tmp_path, (), ITEMS, Encoder().states, chunk=0)


def test_full_disk_is_explained_and_finished_chunks_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, flushes = Encoder(), []

    def no_space(_: int) -> None:
        flushes.append(1)
        if len(flushes) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(TrimtabError, match="disk is full"):
            cached_states(tmp_path, (), ITEMS, encoder.states, chunk=10)
    check_states(cached_states(tmp_path, (), ITEMS, encoder.states, chunk=10), ITEMS)
    assert len(encoder.seen) <= len(ITEMS) + 10


def test_lack_of_space_is_foretold_after_the_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    encoder = Encoder()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 100))
        with pytest.raises(TrimtabError, match="free some space"):
            cached_states(tmp_path, (), ITEMS, encoder.states, chunk=10)
    assert len(encoder.seen) == 10
    check_states(cached_states(tmp_path, (), ITEMS, encoder.states, chunk=10), ITEMS)
    assert len(encoder.seen) == 50


def test_errors_of_compute_pass_through(tmp_path: Path) -> None:
    def fail(_: list[str]) -> list[np.ndarray]:
        raise PermissionError(errno.EACCES, "not about the cache")

    with pytest.raises(PermissionError):
        cached_states(tmp_path, (), ITEMS, fail)


def test_bytes_needed_match_the_files(tmp_path: Path) -> None:
    states = cached_states(tmp_path, (), ITEMS, Encoder().states)
    files = [path for path in states.folder.iterdir() if path.suffix != ".json"]
    mean = states.total_tokens / len(ITEMS)
    assert cache_bytes_needed(len(ITEMS), DIM, tokens_per_item=mean) == sum(path.stat().st_size for path in files)
    vectors = cached_vectors(tmp_path, (), ITEMS, Encoder().vectors, dtype="float32")
    assert cache_bytes_needed(len(ITEMS), DIM, dtype="float32") == vectors.nbytes
    meta = json.loads((states.folder / "meta.json").read_text())
    assert (meta["items"], meta["rows"], meta["dim"]) == (len(ITEMS), states.total_tokens, DIM)
