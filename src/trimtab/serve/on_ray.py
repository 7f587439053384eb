"""The shards of a job on the workers of a Ray cluster. A worker that dies loses nothing: its shard is done again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.serve.embed import Job, make_shard
from trimtab.serve.items import Work
from trimtab.serve.store import ShardNote

if TYPE_CHECKING:
    from trimtab.towers.dual_encoder import DualEncoder

logger = logging.getLogger(__name__)

_ATTEMPTS = 3  # per shard: one that kills every worker is not worth a fourth


class Worker:
    """Makes shards; its threads are those of the machine that it runs on."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model: DualEncoder | None = None

    def make(self, work: Work) -> ShardNote:
        """See `make_shard`. The model is loaded here, where an error reaches whoever started the job."""
        self.model = self.model or self.job.load_model()
        return make_shard(self.model, self.job, work)


def run_on_ray(
    job: Job, works: Iterator[Work], *, workers: int, done: Callable[[ShardNote], None], cpus_each: float = 1
) -> None:
    """Do shards on a cluster: the one that RAY_ADDRESS names, one that runs on this machine, or else a new local one.

    Args:
        works: drawn as workers become free.
        workers: at most so many at a time.
        done: is called with the note of each finished shard.

    Raises:
        TrimtabError: Ray is not installed; a shard failed, or ended its worker, three times.
    """
    try:
        import ray
    except ImportError as error:
        raise TrimtabError("the engine 'ray' needs Ray: pip install 'trimtab[ray]'") from error
    if workers < 1:
        raise TrimtabError(f"workers={workers} must be at least 1")
    ours = not ray.is_initialized()
    if ours:
        ray.init(num_cpus=None, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        _Pool(ray, job, works, workers, done, cpus_each).run()
    finally:
        if ours:
            ray.shutdown()


class _Pool:
    def __init__(
        self, ray: Any, job: Job, works: Iterator[Work], workers: int, done: Callable[[ShardNote], None], cpus: float
    ) -> None:
        self.ray, self.job, self.works, self.workers, self.done = ray, job, works, workers, done
        self.actor = ray.remote(num_cpus=cpus)(Worker)
        self.again: list[Work] = []
        self.attempts: dict[int, int] = {}
        self.running: dict[Any, tuple[Any, Work]] = {}
        self.idle: list[Any] = []

    def run(self) -> None:
        while self._started():
            (ready, *_), _ = self.ray.wait(list(self.running), num_returns=1)
            self._ended(ready)

    def _started(self) -> bool:
        """Hand out shards until all workers have one; whether any is being done."""
        while len(self.running) < self.workers and (work := self._next()) is not None:
            worker = self.idle.pop() if self.idle else self.actor.remote(self.job)
            self.running[worker.make.remote(work)] = (worker, work)
        if len(self.running) < self.workers:
            # Nothing is left to hand out, but shards may wait for workers that the cluster has no room for as long as
            # the idle ones are there. Ray ends a worker that no variable names any more.
            self.idle.clear()
        return bool(self.running)

    def _ended(self, ready: Any) -> None:
        worker, work = self.running.pop(ready)
        if self._collect(ready, work):
            self.idle.append(worker)

    def _next(self) -> Work | None:
        return self.again.pop() if self.again else next(self.works, None)

    def _collect(self, ready: Any, work: Work) -> bool:
        """Whether the worker is still there."""
        try:
            self.done(self.ray.get(ready))
            return True
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, TrimtabError):
                raise cause from error
            raise
        except self.ray.exceptions.RayError as error:  # the worker or its machine is gone
            count = self.attempts[work.number] = self.attempts.get(work.number, 0) + 1
            if count >= _ATTEMPTS:
                raise TrimtabError(
                    f"shard {work.number} ended its worker {count} times ({type(error).__name__}); finished shards are "
                    "kept. Is there enough memory?"
                ) from error
            logger.warning("a worker was lost with shard %d, which is done again", work.number)
            self.again.append(work)
            return False
