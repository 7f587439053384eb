"""What uvicorn leaves open for ever: connections on which no request begins, and answers that nobody reads."""

from __future__ import annotations

import asyncio
from typing import Any

_SLOWEST = 64 << 10  # bytes a second that a client must read


class Unread:
    """Answers that wait in memory until their clients read them, of all connections together."""

    def __init__(self) -> None:
        self._transports: set[asyncio.WriteTransport] = set()

    @property
    def size(self) -> int:
        """Bytes; may be asked from any thread."""
        return sum(one.get_write_buffer_size() for one in tuple(self._transports))

    def add(self, transport: asyncio.WriteTransport) -> None:
        self._transports.add(transport)

    def discard(self, transport: asyncio.WriteTransport) -> None:
        self._transports.discard(transport)


class Watch(asyncio.Protocol):
    """To stand before one of uvicorn's HTTP protocols: ends connections that only take up a place.

    Uvicorn's own keep-alive time-out begins after an answer, and ends with the first byte that comes then.

    Attributes:
        begin_within: seconds from the connection, or from the first byte after an answer, until a request's headers
            must be there.
        read_within: seconds until an answer must be read, above what it takes at `_SLOWEST`.
        unread: counts what is not read yet.
    """

    begin_within: float
    read_within: float
    unread: Unread

    # Of uvicorn's protocols.
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    cycle: Any

    _beginning: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Tells of every byte that is not gone at once: a connection that is closed waits for its last ones for ever.
        self.transport.set_write_buffer_limits(high=0)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_request()
        else:
            self._await_nothing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._await_nothing()
        self._all_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread.add(self.transport)
        seconds = self.read_within + self.transport.get_write_buffer_size() / _SLOWEST
        self._reading = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._all_read()
        super().resume_writing()

    def _await_request(self) -> None:
        """From the first call on, however many bytes come after it."""
        if self._beginning is None:
            self._beginning = self.loop.call_later(self.begin_within, self.transport.close)

    def _await_nothing(self) -> None:
        if self._beginning is not None:
            self._beginning.cancel()
            self._beginning = None

    def _all_read(self) -> None:
        self.unread.discard(self.transport)
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None


def watched(
    base: type[asyncio.Protocol] | None = None, *, begin_within: float, read_within: float, unread: Unread
) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn that keeps the limits of `Watch`.

    Args:
        base: one of uvicorn's; None for the one that it would take itself.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    limits = {"begin_within": begin_within, "read_within": read_within, "unread": unread}
    return type("Watched", (Watch, base or AutoHTTPProtocol), limits)
