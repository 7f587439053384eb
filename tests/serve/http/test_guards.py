"""Who may ask, how much at once, and for how long."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from trimtab.serve.http.connections import Unread
from trimtab.serve.http.guards import Bounded, KnownHost, Measured, WithKey
from trimtab.serve.http.metrics import Metrics


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the size of the body."""
    message = await receive()
    assert message["more_body"] is False
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(message["body"])).encode()})


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def ask(app: Any, *, path: str = "/v1/x", **options: Any) -> httpx.Response:
    async def talk() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.post(path, **options)

    return asyncio.run(talk())


def bounded(app: Any = echo, **options: Any) -> Bounded:
    return Bounded(app, **{"max_body": 100, "max_buffered": 150, "timeout": 5.0, **options})


# The key


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer k\u00e9y".encode("latin-1").decode("latin-1")}, 401),
        ({"authorization": "Basic key"}, 401),
        ({"authorization": "key"}, 401),
        ({"authorization": "Bearer key"}, 200),
        ({"authorization": "bearer  key"}, 200),
    ],
)
def test_the_key_is_asked_for(headers: dict[str, str], status: int) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = ask(WithKey(hello, "key"), headers=raw)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"


def test_the_page_and_the_state_are_open() -> None:
    for path in ("/", "/healthz"):
        assert ask(WithKey(hello, "key"), path=path).status_code == 200
    for path in ("/metrics", "/openapi.json", "/v1/thumbnail", "/healthz/"):
        assert ask(WithKey(hello, "key"), path=path).status_code == 401
    assert ask(WithKey(hello, None)).status_code == 200


# The host


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 421),
        ("localhost.evil.example:8000", 421),
        ("localhost:8000.evil.example", 421),
        ("", 421),
    ],
)
def test_only_names_of_this_machine(host: str, status: int) -> None:
    app = KnownHost(hello, {"localhost", "127.0.0.1", "::1"})
    refused = ask(app, headers={"host": "evil.example"})
    assert "--allow-host" in refused.text
    assert ask(app, headers={"host": host}).status_code == status
    assert ask(KnownHost(hello, None), headers={"host": host}).status_code == 200


# Sizes and times


def test_bodies_up_to_the_limit_pass() -> None:
    app = bounded()
    assert ask(app, content=b"x" * 100).text == "100"
    assert ask(app, content=b"").text == "0"
    answer = ask(app, content=b"x" * 101)
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"
    assert app.buffered == 0


def test_bodies_without_a_length_are_counted() -> None:
    async def parts(count: int) -> Any:
        for _ in range(count):
            yield b"x" * 10

    assert ask(bounded(), content=parts(10)).text == "100"
    assert ask(bounded(), content=parts(11)).status_code == 413


def test_a_length_that_is_none_is_refused() -> None:
    assert ask(bounded(), content=b"x", headers={"content-length": "one"}).status_code == 400


def test_all_bodies_together_have_a_limit() -> None:
    entered, go = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        entered.set()
        await go.wait()
        await echo(scope, receive, send)

    app = bounded(slow)

    async def talk() -> list[int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            first = asyncio.create_task(client.post("/", content=b"x" * 90))
            await entered.wait()
            second = await client.post("/", content=b"x" * 90)
            go.set()
            third_ok = (await first).status_code
            return [third_ok, second.status_code, (await client.post("/", content=b"x" * 90)).status_code]

    assert asyncio.run(talk()) == [200, 503, 200]
    assert app.buffered == 0


def test_answers_that_are_not_read_count_beside_bodies() -> None:
    class Slow(Unread):
        size = 100

    app = bounded(unread=Slow())
    assert ask(app, content=b"x" * 50).status_code == 200
    answer = ask(app, content=b"x" * 51)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    Slow.size = 1000
    assert ask(app, content=b"x").status_code == 503
    assert ask(app, content=b"").status_code == 200, "what brings nothing tells how the server is"


def test_a_body_that_does_not_come_gives_408() -> None:
    async def stuck() -> Any:
        yield b"x"
        await asyncio.sleep(60)

    app = bounded(timeout=0.1)
    assert ask(app, content=stuck()).status_code == 408
    assert app.buffered == 0


def test_an_answer_that_does_not_come_gives_504() -> None:
    async def stuck(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    assert ask(bounded(stuck, timeout=0.1), content=b"x").status_code == 504


def test_a_client_that_leaves_is_counted_and_harms_nobody() -> None:
    metrics = Metrics()
    app = Measured(bounded(), metrics, {"/v1/x"})

    async def leave() -> Any:
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({"type": "http", "path": "/v1/x", "headers": []}, leave, send))
    assert sent == []
    assert metrics.requests.value("/v1/x", "499") == 1


class Talk:
    """A connection that brings a body and, once told, is closed; it notes what was sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.leaves = asyncio.Event()
        self._given = False

    async def receive(self) -> Any:
        if self._given:
            await self.leaves.wait()
            return {"type": "http.disconnect"}
        self._given = True
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def ask(self, app: Any) -> None:
        await asyncio.wait_for(app({"type": "http", "path": "/v1/x", "headers": []}, self.receive, self.send), 10)
        assert asyncio.all_tasks() == {asyncio.current_task()}  # nothing is left behind


def test_what_nobody_waits_for_any_more_is_ended() -> None:
    metrics, ended = Metrics(), []

    async def work() -> list[Any]:
        talk = Talk()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            talk.leaves.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(True)

        app = bounded(slow)
        await talk.ask(Measured(app, metrics, {"/v1/x"}))
        assert app.buffered == 0
        return talk.sent

    assert asyncio.run(work()) == []
    assert ended == [True]
    assert metrics.requests.value("/v1/x", "499") == 1


def test_an_answer_in_parts_ends_when_the_client_leaves() -> None:
    async def work() -> list[Any]:
        talk = Talk()

        async def stream(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            talk.leaves.set()
            await asyncio.sleep(60)

        await talk.ask(Measured(bounded(stream), Metrics(), ()))
        return talk.sent

    assert [message["type"] for message in asyncio.run(work())] == ["http.response.start", "http.response.body"]


def test_what_goes_on_after_the_answer_is_not_ended() -> None:
    done = []

    async def work() -> None:
        talk = Talk()

        async def tidy(scope: Any, receive: Any, send: Any) -> None:
            await echo(scope, receive, send)
            talk.leaves.set()  # as servers say it of every connection that was answered
            await asyncio.sleep(0.05)
            done.append(await receive())

        await talk.ask(bounded(tidy))

    asyncio.run(work())
    assert done == [{"type": "http.disconnect"}]


def test_faults_of_the_application_come_through() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("a bug")

    async def work() -> None:
        with pytest.raises(ValueError, match="a bug"):
            await Talk().ask(bounded(broken))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(work())


def test_unknown_paths_are_counted_as_one() -> None:
    metrics = Metrics()
    app = Measured(hello, metrics, {"/v1/x"})
    for path in ("/v1/x", "/a", "/b"):
        ask(app, path=path)
    assert metrics.requests.value("/v1/x", "200") == 1
    assert metrics.requests.value("other", "200") == 2
