"""Many passes: the same results in the same order, however many threads run them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from trimtab.errors import OutOfMemory
from trimtab.towers.passes import Passes, per_pass, results
from trimtab.towers.turns import Turn

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("threads", [False, True])
def test_order_and_values_are_those_of_one_pass_after_another(two_cores: None, count: int, threads: bool) -> None:
    layer = torch.nn.Linear(5, 3)
    batches = [torch.randn(size + 1, 5) for size in range(count)]
    found = list(results(layer, batches, CPU, threads=threads))
    assert len(found) == count
    for one, batch in zip(found, batches, strict=True):
        torch.testing.assert_close(one, layer(batch).detach())
        assert not one.requires_grad


def test_batches_run_side_by_side_each_with_its_share_of_the_cores(two_cores: None) -> None:
    seen = list(results(lambda _: torch.get_num_threads(), range(4), CPU))
    assert seen == [1] * 4
    assert list(results(lambda _: torch.get_num_threads(), range(4), CPU, threads=False)) == [2] * 4
    assert list(results(lambda _: torch.get_num_threads(), range(1), CPU)) == [2]  # it has all cores for itself
    assert torch.get_num_threads() == 2


def test_threads_that_start_meanwhile_keep_all_cores(two_cores: None) -> None:
    """Also where several threads encode at once, each of which would give back what it found."""

    def cores_of_a_new_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    both = threading.Barrier(2)  # when it opens, both threads of the pool have taken their cores
    with contextlib.closing(results(lambda number: both.wait() if number < 2 else number, range(9), CPU)) as one:
        next(one)
        assert cores_of_a_new_thread() == torch.get_num_threads() == 2
        seen: list[int] = []

        def other() -> None:
            seen.extend(results(lambda _: torch.get_num_threads(), range(4), CPU))
            seen.append(torch.get_num_threads())

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert seen == [1, 1, 1, 1, 2]
    assert cores_of_a_new_thread() == torch.get_num_threads() == 2


def test_autocast_of_the_caller_holds_in_every_thread(two_cores: None) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = list(results(torch.nn.Linear(4, 4), [torch.randn(2, 4)] * 3, CPU))
    assert {one.dtype for one in found} == {torch.bfloat16}
    assert {one.dtype for one in results(torch.nn.Linear(4, 4), [torch.randn(2, 4)] * 3, CPU)} == {torch.float32}


@pytest.mark.parametrize("threads", [False, True])
def test_an_error_reaches_the_caller_and_the_cores_are_given_back(two_cores: None, threads: bool) -> None:
    def run(number: int) -> int:
        if number == 2:
            raise ValueError("the third")
        return number

    with pytest.raises(ValueError, match="the third"):
        list(results(run, range(5), CPU, threads=threads))
    assert torch.get_num_threads() == 2


def test_not_read_to_the_end_it_stops_and_gives_the_cores_back(two_cores: None) -> None:
    made = []

    def batches() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    with contextlib.closing(results(lambda number: number, batches(), CPU)) as found:
        assert next(found) == 0
    assert len(made) < 10
    assert torch.get_num_threads() == 2


def test_only_a_cpu_has_its_passes_cut() -> None:
    assert per_pass(64, "images", CPU) == 16
    assert per_pass(8, "images", CPU) == 8
    assert per_pass(256, "texts", CPU) == 64
    assert per_pass(256, "texts", torch.device("cuda")) == 256


def test_others_are_let_in_between_passes(two_cores: None) -> None:
    turn, seen = Turn(), []

    def other() -> None:
        with turn:
            seen.append("other")

    def run(number: int) -> int:
        if number == 3:
            thread.start()
            while not turn._waiting:
                time.sleep(0.001)
        return number

    for threads in (True, False):
        thread = threading.Thread(target=other)
        with contextlib.closing(results(run, range(100), CPU, threads=threads, turn=turn)) as found:
            for one in found:  # one by one, so that `seen` has all in the order of time
                seen.append(one)
        thread.join()
        assert seen.index("other") < 40
        assert [one for one in seen if one != "other"] == list(range(100))
        assert turn._holder is None
        seen.clear()
    with contextlib.closing(results(lambda number: number, range(100), CPU, turn=turn)) as found:
        next(found)
    assert turn._holder is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_pass_that_is_too_large_for_the_memory_is_halved(error: Exception) -> None:
    sizes = []

    def run(span: slice) -> list[int]:
        sizes.append(span.stop - span.start)
        if sizes[-1] > 5:
            raise error
        return list(range(span.start, span.stop))

    passes = Passes(16)
    assert [number for some in passes.of(run, 20) for number in some] == list(range(20))
    assert sizes == [16, 8, 4, 4, 4, 4, 4]
    assert passes.of(run, 4) == [[0, 1, 2, 3]]  # what did not fit is not tried again


def test_where_not_even_one_item_fits_it_is_said_what_to_do() -> None:
    def full(_: slice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory, match=r"out of memory for a single picture or text: .*CUDA_VISIBLE_DEVICES"):
        Passes(16).of(full, 3)

    def broken(_: slice) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Passes(16).of(broken, 3)
