"""How much the server takes on before it says no."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import TrimtabError

MIB = 1 << 20


@dataclass(frozen=True)
class ServeOptions:
    """Limits of a server; a value outside its range is refused when the object is made.

    Attributes:
        max_batch: items of one forward pass.
        max_wait_ms: how long a batch that is not full waits for more.
        queue: items taken on and not yet answered; a request that does not fit gets 429.
        timeout: seconds until a request gets 504, or 408 where its body does not come; of an answer that is not read,
            beside those for its size, until the connection is ended.
        max_body_mib: size of one request; above it gets 413.
        max_inputs: items of one call; above it gets 422.
        max_text: characters of one text.
        max_megapixels: width times height of one picture.
        max_classes: class names that one call may bring.
        max_k: results of one search.
        connections: open at once; one more gets 503.
        allow_urls: fetch pictures by address, public ones only.
    """

    max_batch: int = 32
    max_wait_ms: float = 2.0
    queue: int = 4096
    timeout: float = 30.0
    max_body_mib: float = 32.0
    max_inputs: int = 2048
    max_text: int = 8192
    max_megapixels: float = 40.0
    max_classes: int = 256
    max_k: int = 100
    connections: int = 512
    allow_urls: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue", "max_inputs", "max_text", "max_classes", "max_k", "connections"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("max_wait_ms", 0 <= self.max_wait_ms <= 1000, "between 0 and 1000")
        self._require("timeout", 0.1 <= self.timeout <= 3600, "between 0.1 and 3600 seconds")
        for name in ("max_body_mib", "max_megapixels"):
            self._require(name, 0 < getattr(self, name) <= 1024, "above 0 and at most 1024")

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            flag = "--" + name.replace("_", "-")
            raise TrimtabError(f"{flag} {getattr(self, name)} must be {allowed}")

    @property
    def max_body(self) -> int:
        """Bytes of one request."""
        return int(self.max_body_mib * MIB)

    @property
    def max_buffered(self) -> int:
        """Bytes of all requests that are being received or answered, and of answers that are not read yet."""
        return max(4 * self.max_body, 256 * MIB)

    @property
    def max_pixels(self) -> int:
        """Pixels of one picture."""
        return int(self.max_megapixels * 1e6)
