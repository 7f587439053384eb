"""What uvicorn leaves open for ever: connections on which no request begins."""

from __future__ import annotations

import asyncio
from typing import Any


class Watch(asyncio.Protocol):
    """To stand before one of uvicorn's HTTP protocols: ends connections that only take up a place.

    Uvicorn's own keep-alive time-out begins after an answer, and ends with the first byte that comes then.

    Attributes:
        begin_within: seconds from the connection, or from the first byte after an answer, until a request's headers
            must be there.
    """

    begin_within: float

    # Of uvicorn's protocols.
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    cycle: Any

    _beginning: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_request()
        else:
            self._await_nothing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._await_nothing()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        """From the first call on, however many bytes come after it."""
        if self._beginning is None:
            self._beginning = self.loop.call_later(self.begin_within, self.transport.close)

    def _await_nothing(self) -> None:
        if self._beginning is not None:
            self._beginning.cancel()
            self._beginning = None


def watched(base: type[asyncio.Protocol] | None = None, *, begin_within: float) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn that keeps the limits of `Watch`.

    Args:
        base: one of uvicorn's; None for the one that it would take itself.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    return type("Watched", (Watch, base or AutoHTTPProtocol), {"begin_within": begin_within})
