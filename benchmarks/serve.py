"""The server under load, beside the bare forward pass of the same model on the same machine.

    python benchmarks/serve.py

Texts and pictures, one per request, over loopback. Four questions for each: what does the model do without a server,
what does one client see, what do many clients get together, and what happens when four times as much comes as can be
done. In the last case every answer must be a result or an explicit 429, 503 or 504, and must come in bounded time.
Writes `benchmarks/results/serve.json` and `serve.md`. It takes about three minutes and wants the machine for itself;
say with `--note` if it was not alone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import trimtab
from trimtab.data.images import read_image
from trimtab.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
REFUSED = (429, 503, 504)
CLIENTS = 32
OVERLOAD = 4
QUEUE = 128
TIMEOUT = 10
_WORDS = [
    "red",
    "green",
    "small",
    "old",
    "wooden",
    "bright",
    "dog",
    "cat",
    "boat",
    "apple",
    "house",
    "river",
    "tree",
    "photo",
    "of",
    "a",
    "the",
    "in",
    "on",
    "near",
]


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of six to fourteen words, all different."""
    noise = np.random.default_rng(seed)
    return [" ".join(noise.choice(_WORDS, noise.integers(6, 15))) + f" {at}" for at in range(count)]


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """JPEGs of 320 x 240 with some structure."""
    noise = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        small = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((320, 240), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=85)
        made.append(stream.getvalue())
    return made


# Without a server


def bare(model: Any, kind: str, items: list[Any], seconds: float, batch: int) -> float:
    """Items per second of forward passes alone: texts from strings, pictures from decoded ones."""
    if kind == "image":
        items = [read_image(one) for one in items]
    encode = model.encode_text if kind == "text" else model.encode_image
    items = items * (1 + batch // len(items))  # so that every pass is full
    encode(items[:batch], batch_size=batch)
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = done % (len(items) - batch + 1)
        encode(items[start : start + batch], batch_size=batch)
        done += batch
    return done / (time.perf_counter() - begun)


# Over HTTP; a client of a few lines, so that it takes little from the server's cores


class Connection:
    """One that stays open from request to request."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> int:
        """The status of an answer; its body is read and left."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer.lower())
        assert length is not None
        await reader.readexactly(int(length[1]))
        if b"connection: close" in answer.lower():
            self.close()
        return int(answer.split(b" ", 2)[1])

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass
class Seen:
    """What clients saw: seconds of each answer by status, faults that are no answer, and how long all of it took."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    whole: float = 0.0

    async def ask(self, connection: Connection, body: bytes) -> None:
        begun = time.perf_counter()
        try:
            status = await asyncio.wait_for(connection.post(body), 3 * TIMEOUT)
            self.seconds.setdefault(status, []).append(time.perf_counter() - begun)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            self.faults[type(error).__name__] += 1
            connection.close()

    def row(self) -> dict[str, Any]:
        good = self.seconds.get(200, [])
        refused = [one for status in REFUSED for one in self.seconds.get(status, [])]
        every = [one for found in self.seconds.values() for one in found]
        return {
            "requests": len(every) + sum(self.faults.values()),
            "statuses": {str(status): len(found) for status, found in sorted(self.seconds.items())},
            "faults": dict(self.faults),
            "per_second": len(good) / self.whole,
            "p50_ms": percentile(good, 50),
            "p99_ms": percentile(good, 99),
            "refused_p99_ms": percentile(refused, 99),
            "slowest_ms": percentile(every, 100),
        }


def percentile(seconds: list[float], which: float) -> float | None:
    return float(1000 * np.percentile(seconds, which)) if seconds else None


async def closed_loop(port: int, bodies: list[bytes], clients: int, seconds: float) -> Seen:
    """Clients that ask again as soon as they are answered."""
    seen, begun = Seen(), time.perf_counter()

    async def client(number: int) -> None:
        connection, at = Connection(port), number
        while time.perf_counter() - begun < seconds:
            await seen.ask(connection, bodies[at % len(bodies)])
            at += clients
        connection.close()

    await asyncio.gather(*map(client, range(clients)))
    seen.whole = time.perf_counter() - begun
    return seen


async def open_loop(port: int, bodies: list[bytes], rate: float, seconds: float) -> Seen:
    """Requests at a rate, whether or not the earlier ones are answered."""
    seen, begun = Seen(), time.perf_counter()
    idle: list[Connection] = []
    running: set[asyncio.Task[None]] = set()

    async def one(body: bytes) -> None:
        connection = idle.pop() if idle else Connection(port)
        await seen.ask(connection, body)
        idle.append(connection)

    sent = 0
    while (now := time.perf_counter() - begun) < seconds:
        while sent < now * rate:
            task = asyncio.create_task(one(bodies[sent % len(bodies)]))
            running.add(task)
            task.add_done_callback(running.discard)
            sent += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*running)
    seen.whole = time.perf_counter() - begun
    for connection in idle:
        connection.close()
    return seen


class Server:
    """`trimtab serve` as a process of its own."""

    def __init__(self, model: str, batch: int) -> None:
        command = [
            *(sys.executable, "-m", "trimtab", "serve", model, "--port", "0", "--max-batch", str(batch)),
            *("--queue", str(QUEUE), "--timeout", str(TIMEOUT), "--connections", "2048"),
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        assert self.process.stdout is not None
        line = ""
        while "http://" not in line:
            line = self.process.stdout.readline()
            assert line, "the server did not start"
        self.port = int(line.split("http://")[1].split()[0].rpartition(":")[2])
        time.sleep(1)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


def measure(kind: str, model: Any, port: int, bodies: list[bytes], items: list[Any], seconds: float, batch: int) -> Any:
    """All four questions for texts or pictures."""

    def run(work: Callable[[], Awaitable[Seen]]) -> dict[str, Any]:
        async def main() -> Seen:
            return await work()

        return asyncio.run(main()).row()

    found: dict[str, Any] = {
        "bare_1_per_second": bare(model, kind, items, seconds / 2, 1),
        "bare_batch_per_second": bare(model, kind, items, seconds / 2, batch),
    }
    run(lambda: closed_loop(port, bodies, CLIENTS, 2))  # until caches and threads are warm
    found["one_client"] = run(lambda: closed_loop(port, bodies, 1, seconds))
    found["many_clients"] = run(lambda: closed_loop(port, bodies, CLIENTS, seconds))
    rate = OVERLOAD * found["many_clients"]["per_second"]
    found["overload"] = {"rate": rate, **run(lambda: open_loop(port, bodies, rate, seconds))}
    found["after"] = run(lambda: closed_loop(port, bodies, 1, seconds / 2))
    overload = found["overload"]
    wrong = {status: count for status, count in overload["statuses"].items() if int(status) not in (200, *REFUSED)}
    found["errors"] = sum(wrong.values()) + sum(overload["faults"].values())
    return found


def markdown(results: dict[str, Any]) -> str:
    lines = [
        f"Model `{results['model']}`, {results['threads']} CPU thread(s), batches of {results['batch']}, one item per "
        f"request, queue of {QUEUE} items, time-out of {TIMEOUT} s; trimtab {results['version']}.",
        *(["", results["note"]] if results["note"] else []),
        "",
        "| | Requests | Per second | p50, ms | p99, ms | Refused | Refused, p99, ms | Slowest, ms | Errors |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, name in (("text", "Texts"), ("image", "Pictures")):
        found = results[kind]
        for size, words in (("1", "one at a time"), ("batch", f"batches of {results['batch']}")):
            lines.append(
                f"| {name}: forward pass alone, {words} | | {found[f'bare_{size}_per_second']:.0f} | | | | | | |"
            )
        rows = (
            ("one_client", "one client"),
            ("many_clients", f"{CLIENTS} clients"),
            ("overload", f"{OVERLOAD} times as many as it can"),
            ("after", "one client, afterwards"),
        )
        for key, words in rows:
            row = found[key]
            refused = sum(row["statuses"].get(str(status), 0) for status in REFUSED)
            errors = row["requests"] - row["statuses"].get("200", 0) - refused
            lines.append(
                f"| {name}: {words} | {row['requests']} | {row['per_second']:.0f} | {shown(row['p50_ms'])} | "
                f"{shown(row['p99_ms'])} | {refused} | {shown(row['refused_p99_ms'])} | {shown(row['slowest_ms'])} | "
                f"{errors} |"
            )
    return "\n".join(lines) + "\n"


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--note", default="", help="what else ran, for the reader")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    import torch

    model = trimtab.load(arguments.model, device="cpu")
    items: dict[str, list[Any]] = {"text": texts(2000), "image": pictures(64)}
    bodies = {
        "text": [json.dumps({"input": one}).encode() for one in items["text"]],
        "image": [json.dumps({"input": {"image": base64.b64encode(one).decode()}}).encode() for one in items["image"]],
    }
    results: dict[str, Any] = {
        "model": arguments.model,
        "batch": arguments.batch,
        "threads": torch.get_num_threads(),
        "version": trimtab.__version__,
        "note": arguments.note,
    }
    server = Server(arguments.model, arguments.batch)
    try:
        for kind in ("text", "image"):
            results[kind] = measure(
                kind, model, server.port, bodies[kind], items[kind], arguments.seconds, arguments.batch
            )
    finally:
        results["exit_status"] = server.stop()
    write_json(arguments.out / "serve.json", results)
    write_text(arguments.out / "serve.md", markdown(results))
    print(markdown(results))
    for kind in ("text", "image"):
        if results[kind]["errors"]:
            sys.exit(f"{kind}: {results[kind]['errors']} answers were neither results nor explicit refusals")


if __name__ == "__main__":
    main()
