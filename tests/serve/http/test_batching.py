"""The queue before the model: shared passes, fair turns, bounds, faults that stay with their request, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import DataError, ModelError
from trimtab.serve.http.batching import Batcher
from trimtab.serve.http.problems import Problem


class Echo:
    """Gives its items back and notes the passes; holds the first one until told."""

    def __init__(self, hold: bool = False) -> None:
        self.passes: list[list[Any]] = []
        self.go = threading.Event()
        self.entered = threading.Event()
        if not hold:
            self.go.set()

    def __call__(self, items: list[Any]) -> list[Any]:
        self.passes.append(list(items))
        self.entered.set()
        assert self.go.wait(10)
        if "panic" in items:
            raise BaseException("a tokenizer panicked")
        if "bad" in items:
            raise ValueError("secret of the model")
        return [("done", item) for item in items]


def batcher(echo: Callable[[list[Any]], list[Any]], **options: Any) -> Batcher:
    chosen = {"max_batch": 4, "max_wait": 0.0, "capacity": 100, **options}
    made = Batcher({"text": echo, "image": echo}, **chosen)
    made.start()
    return made


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


def test_results_come_in_order_and_passes_are_bounded() -> None:
    echo = Echo()
    made = batcher(echo)

    async def work() -> Any:
        return await made.submit("text", list(range(10)))

    assert run(work()) == [("done", number) for number in range(10)]
    assert [len(one) for one in echo.passes] == [4, 4, 2]
    assert made.stop(5)


def test_requests_that_wait_share_a_pass_of_their_kind() -> None:
    echo = Echo(hold=True)
    made = batcher(echo, max_batch=8)

    async def work() -> Any:
        first = asyncio.create_task(made.submit("text", ["first"]))
        await asyncio.to_thread(echo.entered.wait, 10)
        rest = [asyncio.create_task(made.submit(kind, [kind, at])) for kind in ("text", "image") for at in range(2)]
        await asyncio.sleep(0.05)
        echo.go.set()
        return await asyncio.gather(first, *rest)

    run(work())
    assert echo.passes == [["first"], ["text", 0, "text", 1], ["image", 0, "image", 1]]
    made.stop(5)


def test_a_large_request_does_not_make_small_ones_wait_for_all_of_it() -> None:
    echo = Echo(hold=True)
    made = batcher(echo)
    order: list[str] = []

    async def one(name: str, count: int) -> None:
        await made.submit("text", [name] * count)
        order.append(name)

    async def work() -> None:
        large = asyncio.create_task(one("large", 40))
        await asyncio.to_thread(echo.entered.wait, 10)
        small = asyncio.create_task(one("small", 2))
        await asyncio.sleep(0.05)
        echo.go.set()
        await asyncio.gather(large, small)

    run(work())
    assert order == ["small", "large"]
    assert any("small" in one for one in echo.passes[:3])
    made.stop(5)


def test_who_would_wait_too_long_is_told_at_once() -> None:
    echo = Echo(hold=True)

    def slow(items: list[Any]) -> list[Any]:
        time.sleep(0.02 * len(items))
        return echo(items)

    made = batcher(slow, patience=0.5)
    echo.go.set()

    async def work() -> list[Any]:
        await made.submit("text", ["a"] * 4)  # from here on the pace is known
        echo.go.clear()
        jobs = [asyncio.create_task(made.submit("text", [at])) for at in range(60)]
        await asyncio.sleep(0.1)
        echo.go.set()
        return await asyncio.gather(*jobs, return_exceptions=True)

    found = run(work())
    refused = [one for one in found if isinstance(one, Problem)]
    assert 0 < len(refused) < 55
    assert {one.status for one in refused} == {429}
    assert all("0.5 s are the limit" in one.message for one in refused)
    made.stop(5)


def paced(echo: Echo, **options: Any) -> Batcher:
    """One whose passes take 20 ms an item."""

    def slow(items: list[Any]) -> list[Any]:
        time.sleep(0.02 * len(items))
        return echo(items)

    return batcher(slow, **options)


def test_a_large_request_does_not_have_small_ones_refused() -> None:
    echo = Echo()
    made = paced(echo, patience=1.9)

    async def work() -> Any:
        await made.submit("text", ["a"] * 4)  # from here on the pace is known
        echo.entered.clear()
        echo.go.clear()
        large = [asyncio.create_task(made.submit("text", ["large"] * 60)) for _ in range(2)]
        await asyncio.to_thread(echo.entered.wait, 10)
        small = [asyncio.create_task(made.submit("text", ["small"])) for _ in range(5)]
        await asyncio.sleep(0.05)
        echo.go.set()
        return await asyncio.gather(*large, *small, return_exceptions=True)

    first, second, *small = run(work())
    assert len(first) == 60
    assert isinstance(second, Problem)
    assert second.status == 429
    assert small == [[("done", "small")]] * 5
    made.stop(5)


def test_a_request_in_parts_is_taken_on_or_refused_as_a_whole() -> None:
    echo = Echo()
    made = paced(echo, patience=1.0)

    async def work() -> Any:
        await made.submit("text", ["a"] * 4)  # from here on the pace is known
        with made.expecting("text", 40) as coming:
            with pytest.raises(Problem) as caught, made.expecting("text", 40):
                pass
            parts = [await made.submit("text", ["b"] * 4, coming) for _ in range(10)]
        with made.expecting("text", 40):  # nothing of the first is left
            return caught.value.status, parts

    status, parts = run(work())
    assert status == 429
    assert [len(one) for one in parts] == [4] * 10
    made.stop(5)


def test_what_is_to_come_of_a_request_joins_behind_a_newcomer() -> None:
    echo = Echo()
    made = paced(echo, patience=0.6)

    async def in_parts() -> None:
        with made.expecting("text", 8) as coming:
            for _ in range(2):
                await made.submit("text", ["a"] * 4, coming)

    async def work() -> Any:
        await made.submit("text", ["a"] * 4)  # from here on the pace is known: 20 ms an item
        echo.entered.clear()
        echo.go.clear()
        others = [asyncio.create_task(in_parts()) for _ in range(5)]
        await asyncio.to_thread(echo.entered.wait, 10)
        small = asyncio.create_task(made.submit("text", ["small"]))  # behind 20 items, before 20 more
        await asyncio.sleep(0.05)
        echo.go.set()
        return await asyncio.gather(small, *others, return_exceptions=True)

    assert run(work()) == [[("done", "small")], *[None] * 5]
    made.stop(5)


def test_jobs_that_are_run_again_after_a_failure_are_passes_of_their_own() -> None:
    ages: list[float] = []

    def forward(items: list[Any]) -> list[Any]:
        ages.append(made.pass_seconds)
        time.sleep(0.05)
        if "bad" in items:
            raise ValueError("bad")
        return items

    made = batcher(forward, max_batch=16, max_wait=0.2)

    async def work() -> Any:
        jobs = (made.submit("text", [one]) for one in [*"abcdefghijklmno", "bad"])
        return await asyncio.gather(*jobs, return_exceptions=True)

    found = run(work())
    assert [isinstance(one, Problem) for one in found] == [False] * 15 + [True]
    assert len(ages) == 17
    assert max(ages) < 0.5  # all together take longer
    made.stop(5)


def test_what_can_never_be_done_in_time_is_refused_at_once_while_the_pace_is_fresh() -> None:
    echo = Echo()
    made = paced(echo, patience=0.5)

    async def work() -> Any:
        await made.submit("text", ["a"] * 4)
        with pytest.raises(Problem, match="send less at once") as caught:
            await made.submit("text", ["b"] * 40)
        await asyncio.sleep(0.6)
        return caught.value, await made.submit("text", ["c"] * 40)

    refused, later = run(work())
    assert refused.status == 413
    assert len(later) == 40
    assert not any("b" in one for one in echo.passes)
    made.stop(5)


def test_items_alone_say_nothing_of_the_pace_of_many() -> None:
    echo = Echo()

    def slow(items: list[Any]) -> list[Any]:
        time.sleep(0.05)
        return echo(items)

    made = batcher(slow, patience=1.0, max_batch=50)

    async def work() -> Any:
        await made.submit("text", ["a"])
        return await made.submit("text", ["b"] * 100)

    assert len(run(work())) == 100
    made.stop(5)


def test_dear_items_make_small_passes() -> None:
    echo = Echo()
    made = batcher(echo, cost=lambda kind, item: float(item))

    async def work() -> Any:
        return await made.submit("text", [1, 1, 3, 9, 1, 1, 1, 1, 1])

    assert [item for _, item in run(work())] == [1, 1, 3, 9, 1, 1, 1, 1, 1]
    assert echo.passes == [[1, 1], [3], [9], [1, 1, 1, 1], [1]]
    made.stop(5)


def test_a_pass_that_is_not_full_waits_for_more() -> None:
    echo = Echo()
    made = batcher(echo, max_wait=10.0, max_batch=2)

    async def work() -> None:
        first = asyncio.create_task(made.submit("text", ["a"]))
        await asyncio.sleep(0.05)
        assert echo.passes == []
        await asyncio.gather(first, made.submit("text", ["b"]))

    run(work())
    assert echo.passes == [["a", "b"]]
    made.stop(5)


def test_there_is_room_until_there_is_none() -> None:
    made = batcher(Echo(), capacity=5)
    with made.room(3):
        with pytest.raises(Problem) as caught, made.room(3):
            pass
        assert caught.value.status == 429
        assert caught.value.headers["Retry-After"] == "1"
        with made.room(2):
            assert made.reserved == 5
    assert made.reserved == 0
    made.stop(5)


@pytest.mark.parametrize("fault", ["bad", "panic"])
def test_a_fault_stays_with_its_request(fault: str) -> None:
    echo = Echo(hold=True)
    made = batcher(echo, max_batch=8)

    async def work() -> Any:
        first = asyncio.create_task(made.submit("text", ["first"]))
        await asyncio.to_thread(echo.entered.wait, 10)
        jobs = [asyncio.create_task(made.submit("text", [name])) for name in ("good", fault, "fine")]
        await asyncio.sleep(0.05)
        echo.go.set()
        return await asyncio.gather(first, *jobs, return_exceptions=True)

    _, good, wrong, fine = run(work())
    assert (good, fine) == ([("done", "good")], [("done", "fine")])
    assert isinstance(wrong, Problem)
    assert wrong.status == 500
    assert "secret" not in wrong.message
    assert made.alive
    assert made.metrics.failures.value() == 1
    made.stop(5)


@pytest.mark.parametrize(
    ("error", "status"), [(DataError("text 3 is odd"), 422), (ModelError("NaN"), 500), (Problem(404, "none"), 404)]
)
def test_errors_keep_their_words_where_these_are_for_people(error: Exception, status: int) -> None:
    def fail(_: list[Any]) -> list[Any]:
        raise error

    made = batcher(fail)

    async def work() -> None:
        await made.submit("text", ["a"])

    with pytest.raises(Problem, match=r"odd|NaN|none") as caught:
        run(work())
    assert caught.value.status == status
    made.stop(5)


def test_too_few_results_are_a_fault() -> None:
    made = batcher(lambda items: items[:-1])

    async def work() -> None:
        await made.submit("text", ["a", "b"])

    with pytest.raises(Problem, match="log"):
        run(work())
    made.stop(5)


def test_what_nobody_waits_for_is_not_computed() -> None:
    echo = Echo(hold=True)
    made = batcher(echo)

    async def work() -> None:
        first = asyncio.create_task(made.submit("text", ["first"]))
        await asyncio.to_thread(echo.entered.wait, 10)
        second = asyncio.create_task(made.submit("text", ["second"]))
        await asyncio.sleep(0.05)
        assert made.waiting == 1
        second.cancel()
        await asyncio.sleep(0)
        assert made.waiting == 0
        echo.go.set()
        await first
        await made.submit("text", ["third"])

    run(work())
    assert echo.passes == [["first"], ["third"]]
    made.stop(5)


def test_functions_run_on_the_thread_of_the_model() -> None:
    threads: list[str] = []

    def forward(items: list[Any]) -> list[Any]:
        threads.append(threading.current_thread().name)
        return items

    made = batcher(forward)

    async def work() -> Any:
        await made.submit("text", ["a"])
        return await made.call(lambda: threading.current_thread().name)

    assert [run(work())] == threads
    made.stop(5)


def test_stopping_finishes_the_queue_and_takes_no_more() -> None:
    echo = Echo(hold=True)
    made = batcher(echo)

    async def work() -> Any:
        jobs = [asyncio.create_task(made.submit("text", [at] * 3)) for at in range(3)]
        await asyncio.to_thread(echo.entered.wait, 10)
        threading.Timer(0.05, echo.go.set).start()
        stopped = await asyncio.to_thread(made.stop, 10)
        with pytest.raises(Problem) as caught:
            await made.submit("text", ["late"])
        assert caught.value.status == 503
        return stopped, await asyncio.gather(*jobs)

    stopped, results = run(work())
    assert stopped
    assert [len(one) for one in results] == [3, 3, 3]
    assert not made.alive


def test_stopping_gives_up_on_a_pass_that_hangs() -> None:
    echo = Echo(hold=True)
    made = batcher(echo)

    async def work() -> None:
        job = asyncio.create_task(made.submit("text", ["a"]))
        await asyncio.to_thread(echo.entered.wait, 10)
        begun = time.monotonic()
        assert not await asyncio.to_thread(made.stop, 0.1)
        assert time.monotonic() - begun < 5
        job.cancel()

    run(work())
    echo.go.set()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.sampled_from(["text", "image"]), st.integers(0, 9)), max_size=12),
    max_batch=st.integers(1, 5),
    costs=st.lists(st.floats(0.5, 9), min_size=9, max_size=9),
)
def test_every_item_goes_through_once_and_comes_back_to_its_request(
    sizes: list[tuple[str, int]], max_batch: int, costs: list[float]
) -> None:
    echo = Echo()
    made = batcher(echo, max_batch=max_batch, cost=lambda kind, item: costs[item[1]])
    jobs = [(kind, [(number, at) for at in range(count)]) for number, (kind, count) in enumerate(sizes)]

    async def work() -> Any:
        return await asyncio.gather(*(made.submit(kind, items) for kind, items in jobs))

    assert run(work()) == [[("done", item) for item in items] for _, items in jobs]
    seen = [item for one in echo.passes for item in one]
    assert sorted(seen) == sorted(item for _, items in jobs for item in items)
    assert all(len(one) <= max_batch for one in echo.passes)
    assert made.stop(5)


def test_how_long_the_running_pass_has_taken() -> None:
    echo = Echo(hold=True)
    made = batcher(echo)

    async def work() -> tuple[float, float]:
        job = asyncio.create_task(made.submit("text", ["a"]))
        await asyncio.to_thread(echo.entered.wait, 10)
        await asyncio.sleep(0.05)
        during = made.pass_seconds
        echo.go.set()
        await job
        assert await asyncio.to_thread(made.stop, 5)
        return during, made.pass_seconds

    assert made.pass_seconds == 0
    during, after = run(work())
    assert during >= 0.05
    assert after == 0
