from __future__ import annotations

import copy
import pickle
import threading
import time

import pytest

from trimtab.towers.turns import Turn


def can_take(turn: Turn) -> bool:
    """Whether another thread gets it soon."""
    taken = threading.Event()

    def take() -> None:
        with turn:
            taken.set()

    threading.Thread(target=take, daemon=True).start()
    return taken.wait(0.1)


def test_one_thread_at_a_time_and_that_one_again() -> None:
    turn = Turn()
    with turn, turn:
        assert not can_take(turn)
    assert can_take(turn)


def test_a_copy_is_a_turn_of_its_own_and_of_all_that_shared_it() -> None:
    turn = Turn()
    with turn:
        twins = copy.deepcopy([turn, turn])
        assert twins[0] is twins[1]
        assert can_take(twins[0])
        assert can_take(pickle.loads(pickle.dumps(turn)))


def test_who_came_first_has_it_first() -> None:
    turn, order, ready = Turn(), [], threading.Barrier(2)

    def wait() -> None:
        ready.wait()
        with turn:
            order.append("other")

    with turn:
        other = threading.Thread(target=wait)
        other.start()
        ready.wait()
        while not turn._waiting:
            time.sleep(0.001)
    with turn:  # though this thread is running, and the other would have to wake up
        order.append("this")
    other.join()
    assert order == ["other", "this"]


def test_one_that_gives_up_leaves_no_place_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = Turn()
    turn._holder = -1  # some other thread's

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(turn._changed, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        turn.__enter__()
    monkeypatch.undo()
    turn._holder = None
    assert can_take(turn)
