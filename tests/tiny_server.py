"""The server over a tiny model, asked in this process; pictures as clients send them; a stub that is slow or breaks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from trimtab.serve.http.app import create_app
from trimtab.serve.http.run import bind
from trimtab.serve.http.service import Service


def png(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (40, 30)) -> bytes:
    """A PNG of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


@contextlib.asynccontextmanager
async def client_of(service: Service, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, which is started and stopped."""
    app = create_app(service, **options)
    received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    lifespan = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, received.get, sent.put))
    await received.put({"type": "lifespan.startup"})
    assert (await sent.get())["type"] == "lifespan.startup.complete"
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", timeout=30) as client:
            yield client
    finally:
        await received.put({"type": "lifespan.shutdown"})
        await lifespan


class Running:
    """A server whose event loop runs in a thread of its own, so that tests ask it line by line."""

    def __init__(self, service: Service, **options: Any) -> None:
        self.service = service
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._client = client_of(service, **options)
        self.client = self.do(self._client.__aenter__())

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.do(self.client.get(path, **options))

    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return self.do(self.client.post(path, **({} if json is None else {"json": json}), **options))

    def post_raw(self, path: str, content: bytes, kind: str = "application/json") -> httpx.Response:
        return self.post(path, content=content, headers={"content-type": kind})

    def post_all(self, calls: Sequence[tuple[str, Any]]) -> list[httpx.Response]:
        """All at once."""

        async def gathered() -> list[httpx.Response]:
            return await asyncio.gather(*(self.client.post(path, json=body) for path, body in calls))

        return self.do(gathered())

    def close(self) -> None:
        self.do(self._client.__aexit__(None, None, None))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@contextlib.contextmanager
def running(service: Service, **options: Any) -> Iterator[Running]:
    server = Running(service, **options)
    try:
        yield server
    finally:
        server.close()


class Site:
    """A real server on loopback, in a thread."""

    def __init__(self, service: Service, key: str | None = None) -> None:
        self.listener = bind("127.0.0.1", 0)
        self.server = uvicorn.Server(uvicorn.Config(create_app(service, api_key=key), log_config=None, lifespan="on"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.02)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()


class StubIndex:
    """A few pictures with vectors, searched one by one."""

    checksum = "0123456789abcdef"

    def __init__(self, vectors: np.ndarray, names: list[str], fingerprint: str = "f") -> None:
        self.vectors, self.names, self.model_fingerprint = vectors, names, fingerprint

    def __len__(self) -> int:
        return len(self.names)

    def search(self, vectors: np.ndarray, k: int = 10) -> Any:
        scores = vectors @ self.vectors.T
        order = np.argsort(-scores, axis=1)[:, :k]
        ids = [[self.names[at] for at in row] for row in order]
        metadata = [[{"id": name, "image": name} for name in row] for row in ids]
        return ids, [list(scores[at, row]) for at, row in enumerate(order)], metadata

    def find(self, id: str) -> dict[str, str] | None:
        return {"id": id, "image": id} if id in self.names else None
