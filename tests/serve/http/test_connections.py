"""Connections that take up a place are ended, those in use are not; over each of uvicorn's protocols that is here."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from trimtab.serve.http import guards
from trimtab.serve.http.connections import Unread, watched
from trimtab.serve.http.guards import Bounded
from trimtab.serve.http.run import bind

LARGE = 16 << 20  # more than sockets take on
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(params=["h11_impl.H11Protocol", "httptools_impl.HttpToolsProtocol"])
def base(request: Any) -> Any:
    module, name = request.param.split(".")
    pytest.importorskip(module.removesuffix("_impl"))
    return getattr(importlib.import_module(f"uvicorn.protocols.http.{module}"), name)


def wait_for(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


async def answer(send: Any, body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await answer(send, b"hello")


def limited(
    base: Any = None, *, begin_within: float = 60, read_within: float = 60, unread: Unread | None = None
) -> Any:
    return watched(base, begin_within=begin_within, read_within=read_within, unread=unread or Unread())


async def large(scope: Any, receive: Any, send: Any) -> None:
    await answer(send, bytes(LARGE))


class Place:
    """A server over an application, with uvicorn's own keep-alive time-out out of the way."""

    def __init__(self, app: Any, protocol: Any) -> None:
        self.listener = bind("127.0.0.1", 0)
        config = uvicorn.Config(app, http=protocol, log_config=None, lifespan="off", timeout_keep_alive=60)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def wait_for_connections(self, count: int) -> None:
        wait_for(lambda: self.connections == count)

    def connect(self, **options: int) -> socket.socket:
        found = socket.socket()
        for name, value in options.items():
            found.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        found.settimeout(10)
        found.connect(self.listener.getsockname())
        return found


@contextlib.contextmanager
def place(app: Any, protocol: Any) -> Iterator[Place]:
    found = Place(app, protocol)
    try:
        yield found
    finally:
        found.server.should_exit = found.server.force_exit = True
        found.thread.join(10)
        found.listener.close()


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.settimeout(10)


def asked(connection: socket.socket, request: bytes = GET, body: bytes = b"hello") -> None:
    """Have one answer, and nothing behind it."""
    connection.sendall(request)
    found = b""
    while not found.endswith(body):
        part = connection.recv(1 << 16)
        assert part, "the connection was closed"
        found += part
    assert found.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("answered", "sent"), [(False, b""), (False, b"G"), (False, GET[:-2]), (True, b"G"), (True, GET[:-2])]
)
def test_a_connection_on_which_no_request_begins_is_closed(base: Any, answered: bool, sent: bytes) -> None:
    with place(hello, limited(base, begin_within=0.3)) as server, server.connect() as connection:
        if answered:
            asked(connection)
        started = time.monotonic()
        connection.sendall(sent)
        assert connection.recv(1) == b""
        assert 0.2 < time.monotonic() - started < 5
        server.wait_for_connections(0)


def test_bytes_that_trickle_in_do_not_put_it_off(base: Any) -> None:
    with place(hello, limited(base, begin_within=0.4)) as server, server.connect() as connection:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            for letter in GET[:-10] + b"x" * 1000:
                connection.sendall(bytes([letter]))
                time.sleep(0.02)
        assert time.monotonic() - started < 5
        server.wait_for_connections(0)


def test_a_connection_that_is_used_stays(base: Any) -> None:
    with place(hello, limited(base, begin_within=0.3)) as server, server.connect() as connection:
        for _ in range(4):
            time.sleep(0.2)
            asked(connection)
        connection.sendall(GET[:10])  # in two parts, the second in time
        time.sleep(0.1)
        asked(connection, GET[10:])
        time.sleep(0.5)
        assert is_open(connection)
        asked(connection)


def test_a_request_that_is_answered_slowly_is_not_closed(base: Any) -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.sleep(0.6)
        await hello(scope, receive, send)

    with place(slow, limited(base, begin_within=0.2)) as server, server.connect() as connection:
        asked(connection)
        connection.sendall(GET + GET[:-5])  # the next begins while this one is worked on
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_body_that_comes_slowly_is_not_closed(base: Any) -> None:
    async def whole(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        await hello(scope, receive, send)

    with place(whole, limited(base, begin_within=0.2)) as server, server.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
        for letter in b"body":
            time.sleep(0.1)
            connection.sendall(bytes([letter]))
        asked(connection, b".")


def test_uvicorn_s_choice_is_taken_where_none_is_named() -> None:
    with place(hello, limited(begin_within=0.3)) as server, server.connect() as connection:
        asked(connection)
        connection.sendall(b"GET /")
        assert connection.recv(1) == b""


@pytest.mark.parametrize("request_", [GET, GET[:-2] + b"Connection: close\r\n\r\n"], ids=["kept alive", "closed"])
def test_an_answer_that_is_not_read_is_counted_and_then_dropped(
    base: Any, request_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serve.http.connections._SLOWEST", 1 << 40)
    unread = Unread()
    with place(large, limited(base, read_within=0.5, unread=unread)) as server, server.connect(SO_RCVBUF=4096) as one:
        one.sendall(request_)
        wait_for(lambda: LARGE // 4 < unread.size <= LARGE)
        server.wait_for_connections(0)
        assert unread.size == 0
        with server.connect() as other:
            asked(other, body=bytes(8))


def test_large_answers_have_more_time(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.serve.http.connections._SLOWEST", LARGE)
    with place(large, limited(base, read_within=0.1)) as server, server.connect(SO_RCVBUF=4096) as connection:
        connection.sendall(GET)
        started = time.monotonic()
        server.wait_for_connections(1)
        server.wait_for_connections(0)
        assert 0.3 < time.monotonic() - started < 5


def test_an_answer_that_is_read_slowly_comes_whole(base: Any) -> None:
    unread = Unread()
    with place(large, limited(base, read_within=0.1, unread=unread)) as server, server.connect() as connection:
        connection.sendall(GET)
        first = connection.recv(1 << 20)
        found = len(first) - first.index(b"\r\n\r\n") - 4
        while found < LARGE:
            part = connection.recv(1 << 20)
            assert part, "the connection was closed"
            found += len(part)
            time.sleep(0.02)
        wait_for(lambda: unread.size == 0)
        time.sleep(0.3)
        assert server.connections == 1
        asked(connection, body=bytes(8))


# Bodies that are too large

LIMIT = 4 << 20


def test_a_client_that_sends_too_much_and_then_reads_gets_its_answer(base: Any) -> None:
    app = Bounded(hello, max_body=LIMIT, max_buffered=4 * LIMIT, timeout=20)
    with place(app, limited(base)) as server:
        client = http.client.HTTPConnection(*server.listener.getsockname(), timeout=20)
        client.request("POST", "/", bytes(4 * LIMIT))
        answer = client.getresponse()
        assert answer.status == 413
        assert b"larger than 4 MiB" in answer.read()
        server.wait_for_connections(0)
        client.close()


@pytest.mark.parametrize("header", [b"Content-Length: 4001", b"Transfer-Encoding: chunked"])
def test_by_far_too_much_is_not_read(base: Any, header: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_SILENCE", 60)
    app = Bounded(hello, max_body=1000, max_buffered=4000, timeout=20)
    with place(app, limited(base)) as server, server.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n\r\n7d0\r\n" + bytes(2000))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 413")
        server.wait_for_connections(0)


def test_what_does_not_come_of_it_is_not_awaited(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_SILENCE", 0.2)
    app = Bounded(hello, max_body=1000, max_buffered=4000, timeout=20)
    with place(app, limited(base)) as server, server.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1001\r\n\r\n" + bytes(500))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 413")
        assert server.connections == 1
        server.wait_for_connections(0)
