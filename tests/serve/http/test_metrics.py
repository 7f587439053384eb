"""The text format of Prometheus."""

from __future__ import annotations

import re

from trimtab.serve.http.metrics import Counter, Histogram, Metrics

_LINE = re.compile(r'^[a-z_]+(\{[a-z_]+="(\\.|[^"\\])*"(,[a-z_]+="(\\.|[^"\\])*")*\})? [0-9.e+-]+$')


def test_counters_and_their_labels() -> None:
    counter = Counter("a_total", "What.", ("path",))
    counter.add('/"x"\n\\')
    counter.add("/", by=2.5)
    assert counter.lines() == [
        "# HELP a_total What.",
        "# TYPE a_total counter",
        'a_total{path="/"} 2.5',
        'a_total{path="/\\"x\\"\\n\\\\"} 1',
    ]
    assert Counter("b_total", "What.").lines()[-1] == "b_total 0"


def test_histograms_add_up() -> None:
    histogram = Histogram("s", "Seconds.", (0.1, 1.0), ("kind",))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.see(value, "text")
    assert histogram.lines()[2:] == [
        's_bucket{kind="text",le="0.1"} 2',
        's_bucket{kind="text",le="1"} 3',
        's_bucket{kind="text",le="+Inf"} 4',
        's_sum{kind="text"} 7.65',
        's_count{kind="text"} 4',
    ]


def test_the_whole_is_well_formed() -> None:
    metrics = Metrics()
    metrics.gauge("g", "A gauge.", lambda: 3)
    metrics.requests.add("/v1/embeddings", "200")
    metrics.request_seconds.see(0.25, "/v1/embeddings")
    text = metrics.text()
    assert text.endswith("\n")
    for line in text.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or _LINE.match(line), line
    assert "\ng 3\n" in text
