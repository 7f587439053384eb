"""Whose turn it is on towers that several models share, and threads use at once."""

from __future__ import annotations

import collections
import threading


class Turn:
    """Held by whoever makes a pass through towers: adapters and prompts lie on them as hooks while they run, and would
    change the pass of another thread.

    Who came first has it first, so that a thread with a million texts lets others in between two passes. The thread
    that holds it may take it again, but not one that this thread waits for, such as a pool's. A copy is a turn of its
    own, as the towers were copied with it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: collections.deque[object] = collections.deque()
        self._holder: int | None = None
        self._depth = 0

    def __enter__(self) -> Turn:
        me = threading.get_ident()
        with self._changed:
            if self._holder != me:
                ticket = object()
                self._waiting.append(ticket)
                try:
                    self._changed.wait_for(lambda: self._holder is None and self._waiting[0] is ticket)
                    self._holder = me
                finally:  # also where Ctrl-C ended the waiting
                    self._waiting.remove(ticket)
                    self._changed.notify_all()
            self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._holder = None
                self._changed.notify_all()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()
