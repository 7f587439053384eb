"""What stands before the routes, as plain ASGI: who may ask, how much, and for how long.

The outermost comes first in a request: `Measured`, then `KnownHost`, `WithKey`, `Bounded`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, TypeAlias

from trimtab.serve.http.connections import Unread
from trimtab.serve.http.metrics import Metrics
from trimtab.serve.http.problems import Problem, overloaded

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

# The page holds no secret and asks for the key itself; whoever restarts a server that does not answer has none.
OPEN_PATHS = frozenset({"/", "/healthz"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_PASSED_OVER = 4  # times the largest body: one that is larger, but not than this, is thrown away as it comes
_SILENCE = 2.0  # seconds without a byte of it, after which no more is awaited


class Gone(Exception):  # noqa: N818 - nothing went wrong
    """The client closed the connection before it was answered."""


async def send_problem(send: Send, problem: Problem, before_end: Callable[[], Awaitable[None]] | None = None) -> None:
    """Answer with a problem.

    Args:
        before_end: what to do when the client can read the answer and the connection is not closed yet.
    """
    body = json.dumps(problem.body, ensure_ascii=False).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-content-type-options": "nosniff",
        **{name.lower(): value for name, value in problem.headers.items()},
    }
    if problem.status in (408, 413):
        headers["connection"] = "close"  # what is left of the body is of no use
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    if before_end is not None:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await before_end()
        body = b""
    await send({"type": "http.response.body", "body": body})


class Measured:
    """Counts answers and their seconds, by route; paths that are none count as "other"."""

    def __init__(self, app: App, metrics: Metrics, routes: Collection[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        route = scope["path"] if scope["path"] in self.routes else "other"
        try:
            await self.app(scope, receive, seen)
        except Gone:
            status = 499
        finally:
            self.metrics.requests.add(route, str(status or 500))
            self.metrics.request_seconds.see(time.monotonic() - started, route)


class KnownHost:
    """Of a server for this machine alone, answers only those who call it by a name of this machine.

    Otherwise a web page of anybody, open in a browser here, could have its own name point to this machine and read
    the answers (DNS rebinding).
    """

    def __init__(self, app: App, names: Collection[str] | None) -> None:
        self.app, self.names = app, None if names is None else frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.names is not None:
            name = _host_name(_header(scope, b"host"))
            if name not in self.names:
                known = ", ".join(sorted(self.names))
                words = f"this server is called {known}: --allow-host adds a name, such as that of a proxy"
                await send_problem(send, Problem(421, words))
                return
        await self.app(scope, receive, send)


class WithKey:
    """Lets through who shows the key as ``Authorization: Bearer KEY``."""

    def __init__(self, app: App, key: str | None) -> None:
        self.app, self.key = app, None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, shown = _header(scope, b"authorization").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), self.key):
                problem = Problem(
                    401, "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
                await send_problem(send, problem)
                return
        await self.app(scope, receive, send)


class Bounded:
    """Reads bodies up to a limit each and a limit together, and ends what takes too long or nobody waits for.

    A body that is announced as too large is refused before a byte of it is read. If it is not by far too large, what
    comes of it then is thrown away: a connection that is closed with bytes unread is reset, and a client that sends all
    before it reads would never see its answer.

    Args:
        max_body: bytes of one request.
        max_buffered: bytes of all requests that are not answered yet, and of all answers that are not read yet.
        timeout: seconds for the body to come, and again until the answer begins.
        unread: the answers that are not read yet, where the server counts them.
    """

    def __init__(
        self, app: App, *, max_body: int, max_buffered: int, timeout: float, unread: Unread | None = None
    ) -> None:
        self.app, self.max_body, self.max_buffered, self.timeout = app, max_body, max_buffered, timeout
        self.unread = unread or Unread()
        self.buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, answered = False, asyncio.Event()

        async def seen(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                answered.set()
            await send(message)

        body = bytearray()
        try:
            await self._read(scope, receive, body)
            await asyncio.wait_for(self._work(scope, bytes(body), receive, seen, answered), self.timeout)
        except (asyncio.TimeoutError, TimeoutError):
            if not started:
                await send_problem(send, Problem(504, f"no answer within {self.timeout:g} seconds: send less at once"))
        except Problem as problem:
            if not started:
                passed_over = problem.status == 413 and 0 < _announced(scope) <= _PASSED_OVER * self.max_body
                await send_problem(send, problem, (lambda: self._pass_over(receive)) if passed_over else None)
        finally:
            self.buffered -= len(body)

    async def _pass_over(self, receive: Receive) -> None:
        """Throw away what comes of a body, until it ends or stops."""

        async def read() -> None:
            while (await asyncio.wait_for(receive(), _SILENCE)).get("more_body", False):
                pass

        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(read(), self.timeout)

    async def _work(self, scope: Scope, body: bytes, receive: Receive, send: Send, answered: asyncio.Event) -> None:
        """Run the application until it ends, or the client leaves without its answer."""
        leaving = asyncio.ensure_future(_disconnected(receive))
        working = asyncio.ensure_future(self.app(scope, _replay(body, leaving), send))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done() and not answered.is_set():
                leaving.result()
                raise Gone
            await working  # servers say of every connection that it left, once it is answered
        finally:
            leaving.cancel()
            working.cancel()
            await asyncio.gather(leaving, working, return_exceptions=True)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        try:
            announced = _announced(scope)
        except ValueError:
            raise Problem(400, "the Content-Length is not a number") from None
        self._check(announced, announced)
        try:
            await asyncio.wait_for(self._collect(receive, body), self.timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise Problem(408, f"the request's body did not come within {self.timeout:g} seconds") from None

    async def _collect(self, receive: Receive, body: bytearray) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            part = message.get("body", b"")
            self._check(len(body) + len(part), len(part))
            body += part
            self.buffered += len(part)
            more = message.get("more_body", False)

    def _check(self, size: int, added: int) -> None:
        if size > self.max_body:
            limit = f"{self.max_body / (1 << 20):g} MiB"
            raise Problem(413, f"the request is larger than {limit}: send less at once, or smaller pictures")
        if added and self.buffered + self.unread.size + added > self.max_buffered:
            raise overloaded("the server holds as many large requests as it can: try again", status=503)


async def _disconnected(receive: Receive) -> Message:
    """The message that the connection is closed; to be awaited when the body is read."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


def _replay(body: bytes, leaving: asyncio.Future[Message]) -> Receive:
    """What the application reads: the body as one message, and then that the connection is closed."""
    given = False

    async def read() -> Message:
        nonlocal given
        if given:
            return await asyncio.shield(leaving)
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")


def _announced(scope: Scope) -> int:
    """Bytes of the body as its header has them; 0 where it has none."""
    return int(_header(scope, b"content-length") or 0)


def _host_name(value: bytes) -> str:
    """The name in a Host header, without its port; empty if it is none."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*))(?::\d*)?", value.decode("latin-1").strip().lower())
    return (found[1] or found[2] or "") if found else ""
