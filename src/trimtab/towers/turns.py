"""Whose turn it is on towers that several models share, and threads use at once."""

from __future__ import annotations

import threading


class Turn:
    """Held by whoever makes a pass through towers: adapters and prompts lie on them as hooks while they run, and would
    change the pass of another thread.

    The thread that holds it may take it again. A copy is a turn of its own, as the towers were copied with it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> Turn:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()
