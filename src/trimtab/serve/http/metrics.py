"""Counters, gauges and histograms in the text format of Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counter:
    """Something that only grows, apart by the values of its labels; safe from several threads."""

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help, tuple(labels)
        self._values: dict[tuple[str, ...], float] = {}
        self._lock = threading.Lock()

    def add(self, *values: str, by: float = 1.0) -> None:
        assert len(values) == len(self.labels), self.name
        with self._lock:
            self._values[values] = self._values.get(values, 0.0) + by

    def value(self, *values: str) -> float:
        """How often so far."""
        return self._values.get(values, 0.0)

    def lines(self) -> list[str]:
        with self._lock:
            found = sorted(self._values.items())
        if not self.labels and not found:
            found = [((), 0.0)]
        return [
            *_head(self.name, self.help, "counter"),
            *(f"{self.name}{_labels(self.labels, values)} {_number(count)}" for values, count in found),
        ]


class Gauge:
    """A value that is asked for when it is read."""

    def __init__(self, name: str, help: str, read: Callable[[], float]) -> None:
        self.name, self.help, self.read = name, help, read

    def lines(self) -> list[str]:
        return [*_head(self.name, self.help, "gauge"), f"{self.name} {_number(self.read())}"]


class Histogram:
    """How often values up to each bound occur, apart by the values of its labels."""

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.bounds, self.labels = name, help, tuple(bounds), tuple(labels)
        self._found: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        self._lock = threading.Lock()

    def see(self, value: float, *values: str) -> None:
        assert len(values) == len(self.labels), self.name
        with self._lock:
            counts, total = self._found.setdefault(values, ([0] * (len(self.bounds) + 1), [0.0]))
            counts[bisect_left(self.bounds, value)] += 1
            total[0] += value

    def lines(self) -> list[str]:
        with self._lock:
            found = sorted((values, list(counts), total[0]) for values, (counts, total) in self._found.items())
        lines = _head(self.name, self.help, "histogram")
        for values, counts, total in found:
            running = 0
            for bound, count in zip([*map(_number, self.bounds), "+Inf"], counts, strict=True):
                running += count
                lines.append(f"{self.name}_bucket{_labels((*self.labels, 'le'), (*values, bound))} {running}")
            lines.append(f"{self.name}_sum{_labels(self.labels, values)} {_number(total)}")
            lines.append(f"{self.name}_count{_labels(self.labels, values)} {running}")
        return lines


class Metrics:
    """What the server counts of itself."""

    def __init__(self) -> None:
        self.requests = Counter("trimtab_requests_total", "Answers, by route and status.", ("route", "status"))
        self.request_seconds = Histogram(
            "trimtab_request_seconds", "From the first byte of a request to its answer.", SECONDS, ("route",)
        )
        self.items = Counter("trimtab_items_total", "Texts and pictures that were embedded.", ("kind",))
        self.batch_size = Histogram("trimtab_batch_size", "Items of a forward pass.", SIZES, ("kind",))
        self.forward_seconds = Histogram("trimtab_forward_seconds", "One forward pass.", SECONDS, ("kind",))
        self.truncated = Counter("trimtab_truncated_texts_total", "Texts cut to the context length.")
        self.failures = Counter("trimtab_forward_failures_total", "Forward passes that raised.")
        self.gauges: list[Gauge] = []

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        self.gauges.append(Gauge(name, help, read))

    def text(self) -> str:
        """The whole exposition."""
        parts: tuple[Counter | Gauge | Histogram, ...] = (
            self.requests, self.request_seconds, self.items, self.batch_size, self.forward_seconds, self.truncated,
            self.failures, *self.gauges,
        )  # fmt: skip
        return "\n".join(line for part in parts for line in part.lines()) + "\n"


def _head(name: str, help: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    if not names:
        return ""
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
