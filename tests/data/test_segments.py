"""A cache through kills, damage, full disks and other processes; `test_cache.py` is about what it gives."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from counting_encoder import DIM, ITEMS, Encoder, check_states, state_of, vectors_of
from trimtab.data import segments
from trimtab.data.cache import cached_states, cached_vectors
from trimtab.errors import TrimtabError

# Kills

KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
from counting_encoder import ITEMS, Encoder
from trimtab.data.cache import cached_states, cached_vectors
encoder = Encoder()
def compute(texts):
    if len(encoder.calls) == 3:
        os.kill(os.getpid(), 9)
    return getattr(encoder, sys.argv[3])(texts)
run = {"states": cached_states, "vectors": cached_vectors}[sys.argv[3]]
run(sys.argv[1], ("k",), ITEMS + ITEMS[:9], compute, chunk=8)
"""


@pytest.mark.parametrize("kind", ["states", "vectors"])
def test_kill_half_way_costs_one_chunk(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parents[1]), kind]
    assert subprocess.run(command, check=False).returncode == -9
    (part,) = tmp_path.glob("*.part")
    assert json.loads((part / "progress.json").read_text())["done"] == 24
    for path in part.iterdir():
        if path.suffix != ".json":
            with path.open("ab") as stream:
                stream.write(b"half a row that progress.json does not count")
    # Another list, and the first 24 of it are there already.
    items, encoder = ITEMS[:24] + ITEMS[:9] + ITEMS[30:], Encoder()
    reports: list[tuple[int, int]] = []
    options = {"chunk": 15, "progress": lambda done, total: reports.append((done, total))}
    if kind == "states":
        check_states(cached_states(tmp_path, ("k",), items, encoder.states, **options), items)
    else:
        vectors = cached_vectors(tmp_path, ("k",), items, encoder.vectors, **options)
        assert np.array_equal(vectors, vectors_of(items).astype(np.float16))
    assert sorted(encoder.seen) == sorted(ITEMS[30:])
    assert reports == [(15, 20), (20, 20)]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("moment", ["_checksums", "write_json", "rename", "unlink"])
@pytest.mark.parametrize("kind", ["states", "vectors"])
def test_kill_while_finishing_loses_nothing(
    kind: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KillError(BaseException):
        pass

    def die(*args: object, **options: object) -> None:
        name = Path(str(args[0])).name
        if (moment == "write_json" and name != "meta.json") or (moment == "unlink" and name != "progress.json"):
            original(*args, **options)
        else:
            raise KillError

    run = {"states": cached_states, "vectors": cached_vectors}[kind]
    encoder = Encoder()
    owner = Path if moment in ("rename", "unlink") else segments
    original = getattr(owner, moment)
    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, die)
        with pytest.raises(KillError):
            run(tmp_path, (), ITEMS, getattr(encoder, kind), chunk=16)
    assert len(encoder.seen) == 50
    result = run(tmp_path, (), ITEMS, getattr(encoder, kind), chunk=16)
    if kind == "states":
        check_states(result, ITEMS)
    else:
        assert np.array_equal(result, vectors_of(ITEMS).astype(np.float16))
    assert len(encoder.seen) == 50, "nothing is computed twice"


@pytest.mark.parametrize("broken", ["progress.json", "arrays.f16", "digests.b16"])
def test_damaged_part_starts_anew(broken: str, tmp_path: Path) -> None:
    def fail(texts: list[str]) -> np.ndarray:
        if len(encoder.calls) == 3:
            raise KeyboardInterrupt
        return encoder.vectors(texts)

    encoder, fresh = Encoder(), Encoder()
    with pytest.raises(KeyboardInterrupt):
        cached_vectors(tmp_path, (), ITEMS, fail, chunk=8)
    (part,) = tmp_path.glob("*.part")
    os.truncate(part / broken, 7)
    assert np.array_equal(
        cached_vectors(tmp_path, (), ITEMS, fresh.vectors, chunk=8), vectors_of(ITEMS).astype(np.float16)
    )
    assert len(fresh.seen) == 50


def test_a_kill_while_float32_is_filled_costs_one_chunk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[list[str]] = []
    stop_at = 14

    def compute(texts: list[str]) -> list[np.ndarray]:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(texts)
        return [state_of(text) * (1e5 if text == ITEMS[40] else 1) for text in texts]

    with pytest.raises(KeyboardInterrupt):
        cached_states(tmp_path, (), ITEMS, compute, chunk=5)
    assert caplog.text.count("keeping the cache in float32") == 1
    assert [item for call in calls[9:] for item in sorted(call, key=ITEMS.index)] == ITEMS[:25]
    calls.clear()
    states = cached_states(tmp_path, (), ITEMS, compute, chunk=5)
    assert sorted(text for call in calls for text in call) == sorted(ITEMS[25:])
    assert caplog.text.count("keeping the cache in float32") == 1
    assert all(states[i].dtype == np.float32 for i in range(len(ITEMS)))
    assert np.array_equal(states[40], (state_of(ITEMS[40]) * 1e5).astype(np.float32))
    assert not list(tmp_path.glob("*.part"))


def test_a_list_that_is_there_leaves_the_part_of_another_alone(tmp_path: Path) -> None:
    def fail(_: list[str]) -> list[np.ndarray]:
        raise KeyboardInterrupt

    cached_states(tmp_path, (), ITEMS[:5], Encoder().states)
    with pytest.raises(KeyboardInterrupt):
        cached_states(tmp_path, (), ITEMS, lambda texts: fail(texts) if ITEMS[20] in texts else Encoder().states(texts),
                      chunk=4)  # fmt: skip
    check_states(cached_states(tmp_path, (), ITEMS[:5], fail), ITEMS[:5])
    assert len(list(tmp_path.glob("*.part"))) == 1


# Several processes


def fill_slowly(folder: str, log: str, items: list[str]) -> None:
    def compute(texts: list[str]) -> list[np.ndarray]:
        time.sleep(0.02)
        with Path(log).open("a") as stream:
            stream.write("".join(f"{text}\n" for text in texts))
        return [state_of(text) for text in texts]

    check_states(cached_states(folder, ("two",), items, compute, chunk=10), items)


@pytest.mark.parametrize("lists", [[ITEMS, ITEMS, ITEMS], [ITEMS[:35], ITEMS[20:], ITEMS[10:40][::-1]]])
def test_processes_compute_every_item_once(lists: list[list[str]], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [context.Process(target=fill_slowly, args=(str(tmp_path / "c"), str(log), items)) for items in lists]
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


# Damage


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def damage_remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", ["states.f16", "lengths.i64", "digests.b16", "meta.json"])
@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_segment_alone_is_computed_anew(
    number: int, damage: Callable[[Path], None], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [ITEMS[:20], ITEMS[20:30], ITEMS[30:]]
    for items in parts:
        cached_states(tmp_path, (), items, Encoder().states)
    (path,) = tmp_path.glob(f"*/{number:06d}/{name}")
    damage(path)
    whole = parts[number % 3]
    with caplog.at_level(logging.WARNING):
        check_states(cached_states(tmp_path, (), whole, Encoder().states), whole)
        assert "damaged" not in caplog.text, "what is not needed is left alone"
        encoder = Encoder()
        check_states(cached_states(tmp_path, (), ITEMS, encoder.states), ITEMS)
    assert f"{number:06d} is damaged" in caplog.text
    assert sorted(encoder.seen) == sorted(parts[number - 1])
    check_states(cached_states(tmp_path, (), ITEMS, encoder.states), ITEMS)
    assert len(encoder.calls) == 1
    assert len(list(tmp_path.glob("*/*/meta.json"))) == 3


def test_damage_in_large_files_is_looked_for_by_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_BLOCK", 16)
    monkeypatch.setattr(segments, "_BLOCKS_CHECKED", 4)
    cached_states(tmp_path, (), ITEMS, Encoder().states)
    for position in (0, -1):
        (path,) = tmp_path.glob("*/*/states.f16")
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)
        for count in (50, 0):
            encoder = Encoder()
            check_states(cached_states(tmp_path, (), ITEMS, encoder.states), ITEMS)
            assert len(encoder.seen) == count


# Memory


def test_a_chunk_ends_where_its_states_fill_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [f"{i} " + "y" * (40 if i % 3 else 2) for i in range(60)]
    whole, parts, reports = Encoder(), Encoder(), []
    cached_states(tmp_path / "whole", (), items, whole.states, chunk=50)
    assert [len(call) for call in whole.calls] == [50, 10]
    monkeypatch.setattr(segments, "_CHUNK_BYTES", 4096)
    states = cached_states(
        tmp_path / "parts", (), items, parts.states, chunk=50, progress=lambda *report: reports.append(report)
    )
    check_states(states, items)
    assert len(parts.calls[0]) == 1, "before anything is known of the states, they may be large"
    sizes = [sum(len(text) + 2 for text in call) * DIM * 2 for call in parts.calls[1:]]
    assert max(sizes) < 2 * 4096
    assert all(3000 < size < 4500 for size in sizes[1:-1])
    assert reports == [(done, 60) for done in np.cumsum([len(call) for call in parts.calls]).tolist()]
    for path in (tmp_path / "whole").glob("*/*/*"):
        assert path.read_bytes() == (tmp_path / "parts" / path.relative_to(tmp_path / "whole")).read_bytes()
    # Vectors have one size, so that `chunk` says all of it.
    vectors = Encoder()
    cached_vectors(tmp_path, (), items, vectors.vectors, chunk=50)
    assert [len(call) for call in vectors.calls] == [50, 10]


def test_states_are_cast_while_they_are_joined(tmp_path: Path) -> None:
    states = [np.ones((500, 1000), np.float32) for _ in ITEMS]
    tracemalloc.start()
    cached_states(tmp_path, (), ITEMS, lambda _: states)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stored = len(ITEMS) * 500 * 1000 * 2
    assert peak < 1.7 * stored, "the states as stored, and which of them are finite"


# Disks


def test_full_disk_is_explained_and_finished_chunks_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, flushes = Encoder(), []

    def no_space(_: int) -> None:
        flushes.append(1)
        if len(flushes) == 10:  # four files a chunk
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(TrimtabError, match="disk is full"):
            cached_states(tmp_path, (), ITEMS, encoder.states, chunk=10)
    assert len(encoder.seen) == 30
    check_states(cached_states(tmp_path, (), ITEMS, encoder.states, chunk=10), ITEMS)
    assert len(encoder.seen) == 30 + 30


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
