"""What reading a body costs."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import pytest
from fastapi import Request

from trimtab.serve.http.bodies import read_form, read_json
from trimtab.serve.http.inputs import ClassifyRequest, EmbeddingRequest, SearchRequest
from trimtab.serve.http.problems import Problem

NUMBERS = b"[" + b"1.5," * 200_000 + b"1.5]"


def read(body: bytes, shape: Any) -> Any:
    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
    return asyncio.run(read_json(Request(scope, receive), shape))


@pytest.mark.parametrize(
    ("start", "end", "shape"),
    [
        (b'{"input": {"text": ', b"}}", EmbeddingRequest),
        (b'{"input": {"text": ', b', "image": 1}}', EmbeddingRequest),
        (b'{"input": {"a": 1, "b": 2, "c": 3, "d": ', b"}}", EmbeddingRequest),
        (b'{"text": 1, "q": 2, "image": ', b"}", SearchRequest),
        (b'{"top_k": "a", "images": ', b"}", ClassifyRequest),
    ],
)
def test_a_fault_costs_no_copies_of_what_is_at_fault(start: bytes, end: bytes, shape: Any) -> None:
    body = start + NUMBERS + end
    tracemalloc.start()
    try:
        with pytest.raises(Problem) as caught:
            read(body, shape)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.status == 422
    assert most < 12 * len(body), "a float is 24 bytes and its place 8, eight times its four characters"


def test_token_ids_are_told_from_other_numbers() -> None:
    for body, told in (
        (b'{"input": 3}', True),
        (b'{"input": [1, 2]}', True),
        (b'{"input": [[1, 2], [3]]}', True),
        (b'{"input": ["a", 3]}', True),
        (b'{"input": [1.5]}', False),
        (b'{"input": [true]}', False),
        (b'{"input": ["a"], "user": 3}', False),
    ):
        with pytest.raises(Problem) as caught:
            read(body, EmbeddingRequest)
        assert ("token ids" in caught.value.message) == told, body


def test_a_form_is_never_written_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", full)
    picture = b"p" * 3_000_000
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    body = head + picture + b"\r\n--b--\r\n"

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "headers": [(b"content-type", b"multipart/form-data; boundary=b")]}
    assert asyncio.run(read_form(Request(scope, receive))).files == [picture]
