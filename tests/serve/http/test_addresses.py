"""Fetching by address: public ones only, whatever a name, a redirect or a slow server tries."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.serve.http.addresses import Fetcher, FetchError, is_public


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "fec0::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::8.8.8.8"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a00:1::1"),
        *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "", "localhost", "0x7f000001", "2130706433"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_an_address_is_as_public_as_its_mapped_form(address: object) -> None:
    assert is_public(f"::ffff:{address}") == is_public(str(address))


Answer = Callable[[socket.socket, bytes], None]


@contextmanager
def server(answer: Answer) -> Iterator[tuple[int, list[bytes]]]:
    """One that gives each connection the bytes it likes, and notes the heads of requests."""
    listener = socket.create_server(("127.0.0.1", 0))
    heads: list[bytes] = []

    def work() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    part = connection.recv(4096)
                    if not part:
                        break
                    head += part
                heads.append(head)
                with suppress(OSError):
                    answer(connection, head)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], heads
    finally:
        listener.close()


def fetcher(port: int, **options: object) -> Fetcher:
    """One for which every name is this machine, as if that were public."""
    chosen = {
        "max_bytes": 1000, "timeout": 5.0, "resolver": lambda host, at: ["127.0.0.1"], "allowed": lambda address: True,
        "ports": (port,), **options,
    }  # fmt: skip
    return Fetcher(**chosen)  # type: ignore[arg-type]


def says(content: bytes) -> Answer:
    return lambda connection, head: connection.sendall(content)


OK = b"HTTP/1.1 200 OK\r\n"


def test_the_body_is_fetched_under_the_name_that_was_asked_for() -> None:
    with server(says(OK + b"Content-Length: 4\r\n\r\nabcd")) as (port, heads):
        assert fetcher(port).fetch(f"http://pictures.example:{port}/a%20b.png?x=1#part") == b"abcd"
    assert heads[0].startswith(b"GET /a%20b.png?x=1 HTTP/1.1\r\n")
    assert f"Host: pictures.example:{port}\r\n".encode() in heads[0]


def test_bodies_in_chunks_or_until_the_end() -> None:
    with server(says(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n")) as (port, _):
        assert fetcher(port).fetch(f"http://a.example:{port}") == b"ab"
    with server(says(OK + b"\r\nabc")) as (port, _):
        assert fetcher(port).fetch(f"http://a.example:{port}") == b"abc"


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://a.example/x", "file:///etc/passwd", "gopher://a.example", "//a.example/x", "a.example", ""),
        *("http://", "http:///x", "http://user@a.example/", "http://u:p@a.example/", "http://a.example:22/"),
        *("http://a.example:99999/", "http://a.example:x/", "http://a.example/a b", "http://a.example/\r\nX: y"),
        *("http://a.example/猫", "http://[::1", "http://a.example:8000/", "http://a.example\t/"),
    ],
)
def test_addresses_that_are_not_fetched(url: str) -> None:
    asked: list[str] = []
    with pytest.raises(FetchError):
        Fetcher(1000, resolver=lambda host, port: asked.append(host) or ["8.8.8.8"]).fetch(url)  # type: ignore[func-returns-value]
    assert asked == []


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:127.0.0.1"], []])
def test_a_name_with_any_private_address_is_refused(addresses: list[str]) -> None:
    with pytest.raises(FetchError, match="no public address"):
        Fetcher(1000, resolver=lambda host, port: addresses).fetch("http://a.example/")


def test_numbers_that_stand_for_this_machine_are_refused() -> None:
    """As the system reads them: 2130706433 is 127.0.0.1."""
    for host in ("127.0.0.1", "2130706433", "0x7f.1", "127.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0"):
        with pytest.raises(FetchError):
            Fetcher(1000, timeout=5).fetch(f"http://{host}/")


def test_redirects_are_checked_again() -> None:
    secret = "http://inside.example"
    names: list[str] = []

    def resolver(host: str, port: int) -> list[str]:
        names.append(host)
        return ["127.0.0.1"] if host == "outside.example" else ["10.0.0.1"]

    with server(says(b"HTTP/1.1 302 Found\r\nLocation: " + secret.encode() + b"\r\n\r\n")) as (port, _):
        chosen = fetcher(port, resolver=resolver, allowed=lambda address: address != "10.0.0.1", ports=(port, 80))
        with pytest.raises(FetchError, match=r"inside\.example.*no public address"):
            chosen.fetch(f"http://outside.example:{port}/")
    assert names == ["outside.example", "inside.example"]


def test_a_name_is_resolved_once() -> None:
    """A second answer could be another one: the connection goes to the address that was checked."""
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    with server(says(OK + b"Content-Length: 1\r\n\r\nx")) as (port, _):
        assert fetcher(port, resolver=lambda host, at: answers.pop(0)).fetch(f"http://a.example:{port}") == b"x"
    assert answers == [["10.0.0.1"]]


@pytest.mark.parametrize("location", [b"file:///etc/passwd", b"ftp://a.example/", b"", b"http://user@a.example/"])
def test_redirects_to_other_kinds_are_refused(location: bytes) -> None:
    with (
        server(says(b"HTTP/1.1 301 Moved\r\nLocation: " + location + b"\r\n\r\n")) as (port, _),
        pytest.raises(FetchError),
    ):
        fetcher(port).fetch(f"http://a.example:{port}/")


def test_redirects_end() -> None:
    with server(says(b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n")) as (port, heads):
        with pytest.raises(FetchError, match="more than 3 redirects"):
            fetcher(port).fetch(f"http://a.example:{port}/")
        assert len(heads) == 4


@pytest.mark.parametrize(
    "content",
    [
        OK + b"Content-Length: 1001\r\n\r\n" + b"x" * 1001,
        OK + b"Content-Length: 999999999999\r\n\r\n",
        OK + b"\r\n" + b"x" * 5000,
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n" * 2,
    ],
)
def test_answers_that_are_too_large_are_refused(content: bytes) -> None:
    with server(says(content)) as (port, _), pytest.raises(FetchError, match="more than 1000 bytes"):
        fetcher(port).fetch(f"http://a.example:{port}/")


@pytest.mark.parametrize(
    "content",
    [
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        OK + b"Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
        OK + b"Content-Length: 10\r\n\r\nx",
        b"nonsense\r\n\r\n",
        b"",
        OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
def test_answers_that_are_no_picture_are_refused(content: bytes) -> None:
    with server(says(content)) as (port, _), pytest.raises(FetchError):
        fetcher(port).fetch(f"http://a.example:{port}/")


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX: ", OK + b"\r\n", OK + b"Content-Length: 900\r\n\r\n"])
def test_a_server_that_drips_is_left(start: bytes) -> None:
    def drip(connection: socket.socket, head: bytes) -> None:
        connection.sendall(start)
        for _ in range(200):
            connection.sendall(b"x")
            time.sleep(0.02)

    with server(drip) as (port, _):
        begun = time.monotonic()
        with pytest.raises(FetchError, match="took too long"):
            fetcher(port, timeout=0.3).fetch(f"http://a.example:{port}/")
        assert time.monotonic() - begun < 3


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(FetchError, match="failed"):
        fetcher(port).fetch(f"http://a.example:{port}/")
