from __future__ import annotations

import copy
import pickle
import threading

from trimtab.towers.turns import Turn


def can_take(turn: Turn) -> bool:
    """Whether another thread could take it now."""
    taken: list[bool] = []

    def take() -> None:
        if got := turn._lock.acquire(timeout=0.05):
            turn._lock.release()
        taken.append(got)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return taken[0]


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
