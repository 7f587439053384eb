"""Pictures by web address, for servers that were told to fetch them: public addresses only.

A name is resolved once, every address it has must be public, and the connection goes to the address that was checked,
so that a name cannot point elsewhere a moment later. Each redirect is checked in the same way.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from trimtab import __version__
from trimtab.errors import DataError

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {
    "User-Agent": f"trimtab/{__version__}",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
}
# Networks that carry an IPv4 address inside an IPv6 one: NAT64, 6to4, and the deprecated "compatible" form.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.ip_network("::/96")

Resolver = Callable[[str, int], Sequence[str]]


class FetchError(DataError):
    """An address that is not fetched, or that gave no picture; the message leaves out what only insiders know."""


def resolve(host: str, port: int) -> list[str]:
    """All IP addresses of a name."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody on the internet could reach."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a zone, as in fe80::1%eth0
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if ip.teredo or ip in _COMPATIBLE or ip in _LOCAL_NAT64 or ip.is_site_local:
            return False
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


@dataclass(frozen=True)
class Fetcher:
    """Fetches a picture's bytes within limits.

    Attributes:
        max_bytes: largest answer.
        timeout: seconds for all of it, redirects included.
        max_redirects: after which it gives up.
        resolver, allowed, ports: for tests, which have no public address.
    """

    max_bytes: int
    timeout: float = 10.0
    max_redirects: int = 3
    resolver: Resolver = resolve
    allowed: Callable[[str], bool] = is_public
    ports: tuple[int, ...] = (80, 443)

    def fetch(self, url: str) -> bytes:
        """The body of the answer.

        Raises:
            FetchError: the address, one that it redirects to, or the answer is not acceptable.
        """
        deadline = time.monotonic() + self.timeout
        for _ in range(self.max_redirects + 1):
            parts, port = self._split(url)
            address = self._address(parts.hostname or "", port)
            try:
                found = self._get(parts, port, address, deadline)
            except FetchError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                late = isinstance(error, TimeoutError)
                reason = "took too long" if late else f"failed ({type(error).__name__})"
                raise FetchError(f"fetching from {_host(parts)} {reason}") from error
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise FetchError(f"more than {self.max_redirects} redirects")

    def _split(self, url: str) -> tuple[SplitResult, int]:
        try:
            url.encode("ascii")
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:  # also UnicodeEncodeError
            raise FetchError("is not a web address of ASCII letters") from error
        if parts.scheme not in _PORTS:
            raise FetchError("only http and https addresses are fetched")
        if not parts.hostname or parts.username is not None or parts.password is not None:
            raise FetchError("an address needs a host, and no user name or password")
        if any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
            raise FetchError("an address has no spaces or control characters")
        port = _PORTS[parts.scheme] if port is None else port
        if port not in self.ports:
            raise FetchError(f"only the ports {', '.join(map(str, self.ports))} are fetched from")
        return parts, port

    def _address(self, host: str, port: int) -> str:
        try:
            addresses = self.resolver(host, port)
        except (OSError, UnicodeError) as error:
            raise FetchError(f"the host {host[:100]!r} cannot be found") from error
        if not addresses or not all(map(self.allowed, addresses)):
            raise FetchError(f"the host {host[:100]!r} has no public address")
        return addresses[0]

    def _get(self, parts: SplitResult, port: int, address: str, deadline: float) -> bytes | str:
        """The body, or the address that the answer redirects to."""
        connection = _Pinned(parts.hostname or "", port, address, parts.scheme == "https", deadline)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers=_HEADERS)
            answer = connection.getresponse()
            if answer.status in _REDIRECTS:
                location = answer.getheader("Location")
                if not location:
                    raise FetchError(f"{_host(parts)} redirects to nowhere")
                return location
            if answer.status != 200:
                raise FetchError(f"{_host(parts)} answers with status {answer.status}")
            if answer.getheader("Content-Encoding", "identity") not in ("", "identity"):
                raise FetchError(f"{_host(parts)} answers in a compressed form that was not asked for")
            return self._read(answer, parts)
        finally:
            connection.finish()
            _left(deadline)  # an answer that the clock cut off looks whole

    def _read(self, answer: http.client.HTTPResponse, parts: SplitResult) -> bytes:
        too_large = FetchError(f"{_host(parts)} sends more than {self.max_bytes} bytes")
        if answer.length is not None and answer.length > self.max_bytes:
            raise too_large
        body = answer.read(self.max_bytes + 1)
        if len(body) > self.max_bytes:
            raise too_large
        if answer.length:  # what is left of the length that was announced
            raise FetchError(f"{_host(parts)} sends less than it announced")
        return body


class _Pinned(http.client.HTTPConnection):
    """A connection to an IP address that was checked, which names and proves the host that was asked for.

    A clock closes it at the deadline: a time-out of the socket would start anew with each byte that comes.
    """

    def __init__(self, host: str, port: int, address: str, secure: bool, deadline: float) -> None:
        super().__init__(host, port)
        self.default_port = _PORTS["https" if secure else "http"]  # decides if the Host header names the port
        self._address, self._secure, self._deadline = address, secure, deadline
        self._clock: threading.Timer | None = None

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), _left(self._deadline))
        if self._secure:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self._clock = threading.Timer(_left(self._deadline), _cut, [self.sock])
        self._clock.daemon = True
        self._clock.start()
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()

    def finish(self) -> None:
        """Close, and stop the clock; `close` is called by the base too, while the answer is still to be read."""
        if self._clock is not None:
            self._clock.cancel()
        self.close()


def _cut(open_socket: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not the method of an SSL socket, which would take away what another thread reads from.
        socket.socket.shutdown(open_socket, socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _host(parts: SplitResult) -> str:
    return (parts.hostname or "")[:100]
