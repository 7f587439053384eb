"""Many forward passes of a frozen tower, in the way that its device likes best.

A GPU wants large batches. A CPU wants what its caches hold, and a core that has a batch of its own waits for no other.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from trimtab.errors import MORE_MEMORY, OutOfMemory, is_out_of_memory

# More of them fall out of a core's caches and are slower.
_ON_CPU = {"images": 16, "texts": 64}
_MOST_THREADS = 8
_PASSES_A_TURN = 8  # of those on several cores at once, before other threads are let in

_taking = threading.Lock()

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def per_pass(wanted: int, kind: str, device: torch.device) -> int:
    """How many ``images`` or ``texts`` go through a tower at once if up to `wanted` may."""
    return min(wanted, _ON_CPU[kind]) if device.type == "cpu" else wanted


def rows_of(tensors: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """Some rows of each tensor of a batch."""
    return {name: tensor[rows] for name, tensor in tensors.items()}


class Passes:
    """Passes of so many items, and of half as many each time that memory does not do for them.

    Attributes:
        size: how many go through at once.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def of(self, run: Callable[[slice], Result], count: int) -> list[Result]:
        """`run` of one span of `count` items after the other.

        Raises:
            OutOfMemory: memory does not even do for one item.
        """
        found: list[Result] = []
        start = 0
        while start < count:
            span = slice(start, min(start + self.size, count))
            try:
                found.append(run(span))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if span.stop - start == 1:
                    raise OutOfMemory(f"out of memory for a single picture or text: {MORE_MEMORY}") from error
            else:
                start = span.stop
                continue
            # Here, since what the error holds is free again by now.
            self.size = (span.stop - start) // 2
        return found


def results(
    run: Callable[[Batch], Result],
    batches: Iterable[Batch],
    device: torch.device,
    *,
    threads: bool = True,
    turn: AbstractContextManager[Any] | None = None,
) -> Generator[Result, None, None]:
    """`run` of each batch, in order, without gradients; on a CPU several at a time, each on a core of its own.

    Close it (`contextlib.closing`) if it may not be read to its end.

    Args:
        threads: whether `run` may be called by several threads at once.
        turn: is held during passes, and given up between one and the next, or after some where several run at once.
    """
    at_once = None if turn is None else _PASSES_A_TURN
    turn = contextlib.nullcontext() if turn is None else turn
    rest = iter(batches)
    # One batch is not worth a pool: it has all cores for itself.
    first = list(itertools.islice(rest, 2))
    rest = itertools.chain(first, rest)
    cores = torch.get_num_threads()
    if not threads or device.type != "cpu" or cores == 1 or len(first) < 2:
        for batch in rest:
            with torch.inference_mode(), turn:
                result = run(batch)
            yield result
        return
    count = min(cores, _MOST_THREADS)
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def one(batch: Batch) -> Result:
        # A new thread knows neither the gradient mode nor the autocast of the one that started it.
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=autocast):
            return run(batch)

    waiting: collections.deque[Future[Result]] = collections.deque()
    pool = ThreadPoolExecutor(count, initializer=_take_cores, initargs=(max(1, cores // count),))
    try:
        more = True
        while more:
            with turn:
                passes = 0
                for batch in itertools.islice(rest, at_once):
                    passes += 1
                    waiting.append(pool.submit(one, batch))
                    if len(waiting) > count:  # one more than can run, so that no thread waits for the next batch
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            more = passes == at_once
    finally:
        pool.shutdown(cancel_futures=True)


def _take_cores(count: int) -> None:
    """Have the thread that calls it use so many cores, and no other one."""
    with _taking:
        # Torch also gives the count to every thread that starts later, so another thread puts that back.
        of_new_threads = torch.get_num_threads()
        torch.set_num_threads(count)
        other = threading.Thread(target=torch.set_num_threads, args=(of_new_threads,))
        other.start()
        other.join()
