"""One thread owns the model; what many requests ask for meanwhile shares its forward passes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import DataError, TrimtabError
from trimtab.serve.http.metrics import Metrics
from trimtab.serve.http.problems import Problem, overloaded

logger = logging.getLogger(__name__)

Forward = Callable[[list[Any]], Sequence[Any]]
_NEWS = 0.2  # weight of the last full pass in the pace
CALL = "call"
"""Kind of jobs whose items are functions; each runs alone."""


@dataclass(eq=False)
class _Job:
    """What one request asks for; its items may go through the model in several passes."""

    kind: str
    items: Sequence[Any]
    costs: Sequence[float]
    answer: asyncio.Future[list[Any]]
    coming: Coming | None = None
    since: float = field(default_factory=time.monotonic)
    taken: int = 0
    done: int = 0
    failed: bool = False
    results: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.results = [None] * len(self.items)

    @property
    def open(self) -> bool:
        """Whether anybody still waits for it."""
        return not self.failed and not self.answer.done()

    def finish(self, outcome: list[Any] | Exception) -> None:
        """Hand the outcome to the event loop; nobody minds if that is gone."""
        with contextlib.suppress(RuntimeError):
            self.answer.get_loop().call_soon_threadsafe(_set, self.answer, outcome)


@dataclass(frozen=True)
class _Pace:
    """How long full passes of a kind took; one item alone takes as long as several, and says little."""

    seconds: float  # for a cost of 1
    noted: float  # when, by the monotonic clock


@dataclass(eq=False)
class Coming:
    """What a request will submit part by part."""

    kind: str
    cost: float


@dataclass(frozen=True)
class _Slice:
    """Neighbouring items of a job that go through the model together."""

    job: _Job
    first: int
    last: int

    @property
    def items(self) -> Sequence[Any]:
        return self.job.items[self.first : self.last]


class Batcher:
    """A bounded queue before one worker thread.

    A pass takes items of one kind from as many jobs as it needs to be full. Of a job larger than that it takes a part,
    and the rest goes to the end of the queue: a request with a thousand texts does not make the others wait for all.

    Args:
        forwards: for each kind of items, what computes a list of them; called from the worker thread alone.
        max_batch: items of one pass, and what they may cost together; an item that costs more goes alone.
        cost: of an item of a kind, 1 for a common one: few long texts take as long as many short ones.
        max_wait: seconds that a pass which is not full waits for more, from when its first job came.
        capacity: items of all requests that are not answered yet.
        patience: seconds, by the pace so far, within which a request that is taken on must be done: who would only hear
            that it took too long hears so at once.
        counted_as: the kind that items of another kind count as in `Metrics.items`.
    """

    def __init__(
        self,
        forwards: Mapping[str, Forward],
        *,
        max_batch: int,
        max_wait: float,
        capacity: int,
        patience: float = float("inf"),
        cost: Callable[[str, Any], float] = lambda kind, item: 1.0,
        metrics: Metrics | None = None,
        counted_as: Mapping[str, str] | None = None,
    ) -> None:
        self.forwards = dict(forwards)
        self.max_batch, self.max_wait, self.capacity, self.cost = max_batch, max_wait, capacity, cost
        self.patience = patience
        self.metrics = metrics or Metrics()
        self.counted_as = dict(counted_as or {})
        self.reserved = 0
        self._pace: dict[str, _Pace] = {}
        self._jobs: deque[_Job] = deque()
        self._coming: list[Coming] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._pass_begun: float | None = None
        self._thread = threading.Thread(target=self._work, name="trimtab-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Take no more jobs, wait until those in the queue are done; False when they take longer than `seconds`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the worker runs."""
        return self._thread.is_alive() and not self._stopping

    @property
    def pass_seconds(self) -> float:
        """How long the pass that runs has taken so far; 0 between passes."""
        begun = self._pass_begun
        return 0.0 if begun is None else time.monotonic() - begun

    @property
    def waiting(self) -> int:
        """Items that no pass has taken yet and somebody waits for."""
        with self._changed:
            return sum(len(job.items) - job.taken for job in self._jobs if job.open)

    @contextlib.contextmanager
    def room(self, count: int) -> Iterator[None]:
        """Hold places in the queue for a request, from before its pictures are decoded until it is answered.

        Called from the event loop, which is why no lock is needed.

        Raises:
            Problem: 429, there is no room.
        """
        if self.reserved + count > self.capacity:
            raise overloaded(f"the server is busy: {self.reserved} items are in work, {self.capacity} are the limit")
        self.reserved += count
        try:
            yield
        finally:
            self.reserved -= count

    @contextlib.contextmanager
    def expecting(self, kind: str, cost: float) -> Iterator[Coming]:
        """Announce a request that will be submitted in parts: it is taken on or refused as a whole, before any of it.

        Raises:
            Problem: 413 or 429, it would take too long.
        """
        coming = Coming(kind, cost)
        with self._changed:
            self._check_patience(kind, cost)
            self._coming.append(coming)
        try:
            yield coming
        finally:
            with self._changed:
                self._coming.remove(coming)

    async def submit(self, kind: str, items: Sequence[Any], coming: Coming | None = None) -> list[Any]:
        """The results of all items, in order; cancelling it takes what is left of the job out of the queue.

        Args:
            coming: the request that they are a part of, where it was announced.

        Raises:
            Problem: 413 or 429, it would take too long; the server is about to stop, or the model failed.
        """
        if not items:
            return []
        costs = [1.0] if kind == CALL else [self.cost(kind, item) for item in items]
        job = _Job(kind, items, costs, asyncio.get_running_loop().create_future(), coming)
        with self._changed:
            if self._stopping:
                raise overloaded("the server is shutting down", status=503, after=5)
            if coming is None:
                self._check_patience(kind, sum(costs))
            else:
                coming.cost -= sum(costs)
            self._jobs.append(job)
            self._changed.notify_all()
        return await job.answer

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that uses the model, run by its thread."""
        return (await self.submit(CALL, [function]))[0]

    # The worker's side

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._stopping:
                    self._changed.wait()
                if not self._jobs:
                    return
                kind, slices = self._gather()
            if slices:
                self._run(kind, slices)
                self._pass_begun = None

    def _gather(self) -> tuple[str, list[_Slice]]:
        """The next pass: items of the kind that has waited longest. The lock is held."""
        head = self._jobs[0]
        limit = 1 if head.kind == CALL else self.max_batch
        while not self._stopping and self._count(head.kind) < limit:
            left = head.since + self.max_wait - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                break
        slices: list[_Slice] = []
        rest: list[_Job] = []
        left_items, left_cost = limit, float(limit)
        for _ in range(len(self._jobs)):
            job = self._jobs.popleft()
            if not job.open:
                continue
            first = job.taken
            if job.kind == head.kind:
                while job.taken < len(job.items) and left_items:
                    cost = job.costs[job.taken]
                    if cost > left_cost and left_items < limit:
                        left_items = 0  # the next pass begins with it
                        break
                    job.taken, left_items, left_cost = job.taken + 1, left_items - 1, left_cost - cost
            if job.taken == first:
                rest.append(job)
            else:
                slices.append(_Slice(job, first, job.taken))
        unfinished = [part.job for part in slices if part.job.taken < len(part.job.items)]
        self._jobs.extend([*rest, *unfinished])
        return head.kind, slices

    def _count(self, kind: str) -> int:
        return sum(len(job.items) - job.taken for job in self._jobs if job.kind == kind and job.open)

    def _check_patience(self, kind: str, cost: float) -> None:
        """Refuse a job that would not be done in time, as far as that is known. The lock is held.

        Jobs take turns, so that every other one counts with at most as many passes as this one needs. A job is refused
        for its own cost by a pace of late alone: else, after a slow hour, large ones would be refused for ever.
        """
        turns = self.max_batch * math.ceil(cost / self.max_batch)
        others = [(job.kind, sum(job.costs[job.taken :])) for job in self._jobs if job.open]
        # What is still to come of a request joins behind the newcomer, if a part of it is in the queue.
        queued = {job.coming for job in self._jobs if job.open}
        others += [(coming.kind, coming.cost) for coming in self._coming if coming not in queued]
        waits = sum(self._pace[kind].seconds * min(left, turns) for kind, left in others if kind in self._pace)
        pace = self._pace.get(kind)
        own = pace.seconds * cost if pace and time.monotonic() - pace.noted < self.patience else 0.0
        if own > self.patience:
            raise Problem(
                413, f"this would take about {own:.0f} s, and {self.patience:g} s are the limit: send less at once"
            )
        if waits + own > self.patience:
            words = f"this would be done in about {waits + own:.0f} s, and {self.patience:g} s are the limit"
            raise overloaded(f"the server is busy: {words}", after=_after(waits))

    def _note_pace(self, kind: str, slices: Sequence[_Slice], seconds: float) -> None:
        cost = sum(sum(part.job.costs[part.first : part.last]) for part in slices)
        if cost < self.max_batch / 2:
            return
        before = self._pace[kind].seconds if kind in self._pace else seconds / cost
        self._pace[kind] = _Pace(before + _NEWS * (seconds / cost - before), time.monotonic())

    def _run(self, kind: str, slices: Sequence[_Slice]) -> None:
        items = [item for part in slices for item in part.items]
        started = self._pass_begun = time.monotonic()
        try:
            results = [items[0]()] if kind == CALL else self.forwards[kind](items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(results)} results for {len(items)} items")
        except BaseException as error:  # tokenizers panic with what is no Exception; this thread must not end
            self._failed(kind, slices, error)
            return
        seconds = time.monotonic() - started
        if kind != CALL:
            self._note_pace(kind, slices, seconds)
        self.metrics.forward_seconds.see(seconds, kind)
        self.metrics.batch_size.see(len(items), kind)
        self.metrics.items.add(self.counted_as.get(kind, kind), by=len(items))
        given = iter(results)
        for part in slices:
            job = part.job
            job.results[part.first : part.last] = [next(given) for _ in part.items]
            job.done += part.last - part.first
            if job.done == len(job.items):
                job.finish(job.results)

    def _failed(self, kind: str, slices: Sequence[_Slice], error: BaseException) -> None:
        if len(slices) > 1:  # one of them is at fault: the others shall not pay
            for part in slices:
                self._run(kind, [part])
            return
        self.metrics.failures.add()
        job = slices[0].job
        job.failed = True
        job.finish(_as_answer(error))


def _after(wait: float) -> int:
    """Seconds until a client should come again."""
    return max(1, min(10, round(wait / 2)))


def _as_answer(error: BaseException) -> Exception:
    if isinstance(error, Problem):
        return error
    if isinstance(error, DataError):
        return Problem(422, str(error))
    logger.error("a forward pass failed", exc_info=error)
    if isinstance(error, TrimtabError):
        return Problem(500, str(error))
    return Problem(500, f"the model failed on this input ({type(error).__name__}); the server's log says more")


def _set(answer: asyncio.Future[list[Any]], outcome: list[Any] | Exception) -> None:
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
