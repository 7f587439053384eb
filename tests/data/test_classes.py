from __future__ import annotations

import logging
import tracemalloc

import numpy as np
import pytest

from trimtab.data.classes import equal_rows, warn_of_equal


def warnings(names: list[str], vectors: np.ndarray, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trimtab"):
        warn_of_equal(names, vectors)
    return [record.getMessage() for record in caplog.records]


def test_equal_vectors_are_named(caplog: pytest.LogCaptureFixture) -> None:
    vectors = np.random.default_rng(1).standard_normal((200, 16)).astype(np.float32)
    names = [f"name {at}" for at in range(200)]
    assert warnings(names, vectors, caplog) == []
    vectors[150] = vectors[7] + 1e-7
    [message] = warnings(names, vectors, caplog)
    assert "the class names 'name 7' and 'name 150' alike, so" in message
    vectors[151] = vectors[7]
    vectors[3] = vectors[2]
    [message] = warnings(names, vectors, caplog)
    assert "'name 2' and 'name 3' alike (and 2 more such pairs)" in message


def test_near_vectors_and_single_classes_are_fine(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(["a"], np.ones((1, 4), np.float32), caplog) == []
    near = np.float32([[1, 0], [1, 1e-5]])
    assert warnings(["a", "b"], near, caplog) == []


def test_many_vectors_are_compared_without_a_copy_of_them() -> None:
    vectors = np.random.default_rng(0).standard_normal((5000, 256)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[4000] = vectors[9]
    tracemalloc.start()
    try:
        assert equal_rows(vectors) == [[9, 4000]]
        assert tracemalloc.get_traced_memory()[1] < vectors.nbytes / 4
    finally:
        tracemalloc.stop()


def test_invisible_characters_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    assert "'cat' and 'cat\\u200b'" in warnings(["cat", "cat\u200b"], np.ones((2, 4), np.float32), caplog)[0]
