"""A server as a process: what it refuses before it starts, that it answers, and how it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from tiny_server import data_uri, png
from trimtab.cli import app
from trimtab.errors import TrimtabError
from trimtab.serve.embed import embed
from trimtab.serve.http.options import ServeOptions
from trimtab.serve.http.run import _log_to_stderr, bind, called, serve, served_name
from trimtab.serve.indexing import build_index


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(TrimtabError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            serve("a model that is never loaded", port=port)


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 70000, "between 0 and 65535"),
        ("127.0.0.1", -1, "between 0 and 65535"),
        ("192.0.2.1", 0, "not of this machine"),
        ("no such host.invalid", 0, "not an address"),
    ],
)
def test_addresses_that_cannot_be_had(host: str, port: int, words: str) -> None:
    with pytest.raises(TrimtabError, match=words):
        bind(host, port)


_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems have to be told of the address first")


@pytest.mark.parametrize(
    ("host", "named"), [("127.0.0.1", True), pytest.param("127.0.0.2", True, marks=_LINUX), ("0.0.0.0", False)]
)
def test_a_server_of_this_machine_alone_has_its_own_names(host: str, named: bool) -> None:
    with contextlib.closing(bind(host, 0)) as listener:
        names = called(listener)
    assert (names is not None) == named
    assert names is None or {host, "localhost"} <= names


def test_a_server_of_this_machine_alone_has_a_proxy_s_name_where_it_is_told_so() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        names = called(listener, ["Clip.example"])
    assert names is not None
    assert {"clip.example", "127.0.0.1"} <= names


def test_a_machine_without_a_place_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", gone)
    with pytest.raises(TrimtabError, match=r"--tmpfs /tmp.*TMPDIR"):
        serve("a model that is never loaded", port=0)


def test_a_server_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr("trimtab.serve.http.run.return_large_blocks", lambda: told.append(True))
    with pytest.raises(TrimtabError):
        serve("a model that is never loaded", port=-1)
    assert told


def test_a_root_path_is_a_path() -> None:
    with pytest.raises(TrimtabError, match="--root-path clip must begin with /"):
        serve("a model that is never loaded", root_path="clip", port=0)


@pytest.mark.parametrize("name", ["clip.example.org:443", "https://clip.example.org", "[::1]", " a", ""])
def test_a_host_that_is_allowed_is_a_name_alone(name: str) -> None:
    with pytest.raises(TrimtabError, match="must be a name alone"):
        serve("a model that is never loaded", allow_hosts=[name], port=0)


def test_hosts_are_allowed_where_not_all_are() -> None:
    with pytest.raises(TrimtabError, match=r"with --host 0\.0\.0\.0 all names do"):
        serve("a model that is never loaded", host="0.0.0.0", allow_hosts=["clip.example.org"], port=0)


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "schlüssel"])
def test_a_key_that_cannot_be_used(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with pytest.raises(TrimtabError, match="A_KEY"):
        serve("a model that is never loaded", api_key_env="A_KEY", port=0)


def test_pictures_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="--pictures needs --index"):
        serve("a model that is never loaded", pictures=tmp_path, port=0)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"max_batch": 0}, {"queue": 0}, {"max_wait_ms": -1.0}, {"timeout": 0.0}, {"max_body_mib": 0.0}),
        *({"max_megapixels": 5000.0}, {"connections": 0}),
    ],
)
def test_limits_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrimtabError, match="--" + next(iter(wrong)).replace("_", "-")):
        ServeOptions(**wrong)


def test_an_index_of_another_model_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    embed(tmp_path / "pictures", tiny_folder("siglip"), tmp_path / "vectors")
    build_index(tmp_path / "vectors", tmp_path / "index")
    with pytest.raises(TrimtabError, match="another model"):
        serve(str(tiny_folder("clip")), index=tmp_path / "index", port=0)


@pytest.mark.parametrize("where", ["pictures", "elsewhere", "texts.csv"])
def test_a_folder_without_the_pictures_of_the_index_is_warned_of(
    tiny_folder: Any, tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, where: str
) -> None:
    for name in ("pictures", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    (tmp_path / "texts.csv").write_text("text\na red apple\n", encoding="utf-8")
    of_texts = where == "texts.csv"
    embed(tmp_path / (where if of_texts else "pictures"), tiny_base("clip"), tmp_path / "vectors")
    build_index(tmp_path / "vectors", tmp_path / "index")
    monkeypatch.setattr("trimtab.serve.http.run._run", lambda server, listener: None)
    monkeypatch.setattr("trimtab.serve.http.run._log_to_stderr", lambda: None)
    with caplog.at_level("WARNING"):
        serve(
            str(tiny_folder("clip")),
            index=tmp_path / "index",
            pictures=tmp_path if of_texts else tmp_path / where,
            port=0,
            device="cpu",
            tell=lambda line: None,
        )
    assert (str(tmp_path / where / "a.png") in caplog.text) == (where == "elsewhere")
    assert ("they have no pictures" in caplog.text) == of_texts


def test_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "language-zh").mkdir()
    assert served_name(f"{tmp_path}/language-zh/") == "language-zh"
    assert served_name("openai/clip-vit") == "openai/clip-vit"


class Process:
    """The command, with what it says."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "trimtab", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        end = time.monotonic() + 60
        while not (found := re.search(r"on (http://\S+)", "".join(self.lines))):
            assert self.popen.poll() is None, "".join(self.lines)
            assert time.monotonic() < end
            time.sleep(0.05)
        self.address = found[1]

    def _read(self) -> None:
        assert self.popen.stdout is not None
        self.lines += self.popen.stdout

    def client(self) -> httpx.Client:
        client = httpx.Client(base_url=self.address, timeout=60, trust_env=False)
        for _ in range(200):  # it names the address just before it listens
            with contextlib.suppress(httpx.ConnectError):
                client.get("/healthz")
                break
            time.sleep(0.05)
        return client

    def end(self) -> int:
        code = self.popen.wait(60)
        self._reader.join(10)
        return code


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[Process]:
    started = Process(*arguments, **environment)
    try:
        yield started
    finally:
        if started.popen.poll() is None:
            started.popen.kill()
            started.popen.wait(10)


def test_as_many_connections_as_were_allowed(tiny_folder: Callable[[str], Path]) -> None:
    with process(str(tiny_folder("clip")), "--connections", "2") as server, contextlib.ExitStack() as stack:
        server.client().close()
        clients = [stack.enter_context(httpx.Client(base_url=server.address, trust_env=False)) for _ in range(3)]
        assert [one.get("/healthz").status_code for one in clients] == [200, 200, 503]


def serve_in_a_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Any, Any], None], **limits: Any
) -> None:
    """Serve, and use the server and its address; in this process, so that its times can be shorter."""

    def run(server: Any, listener: socket.socket) -> None:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            use(server, listener.getsockname())
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)

    monkeypatch.setattr("trimtab.serve.http.run._run", run)
    monkeypatch.setattr("trimtab.serve.http.run._log_to_stderr", lambda: None)
    serve(str(folder), port=0, device="cpu", options=ServeOptions(**limits), tell=lambda line: None)


def test_connections_without_a_request_make_room_for_others(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def use(server: Any, address: tuple[str, int]) -> None:
        with contextlib.ExitStack() as stack, httpx.Client(trust_env=False) as client:
            for _ in range(2):
                connection = stack.enter_context(socket.create_connection(address))
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
            end = time.monotonic() + 10
            while 200 not in seen:
                assert time.monotonic() < end
                seen.append(client.get("http://{}:{}/healthz".format(*address)).status_code)

    monkeypatch.setattr("trimtab.serve.http.run._KEEP_ALIVE", 0.5)
    serve_in_a_thread(tiny_folder("clip"), monkeypatch, use, connections=2)
    assert seen[0] == 503
    assert seen[-1] == 200


def test_answers_that_are_not_read_have_large_requests_wait(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck:
        def get_write_buffer_size(self) -> int:
            return 1 << 30

    def use(server: Any, address: tuple[str, int]) -> None:
        with httpx.Client(base_url="http://{}:{}".format(*address), trust_env=False) as client:
            seen = []
            for change in (lambda one: None, server.config.http.unread.add, server.config.http.unread.discard):
                change(stuck)
                seen.append(client.post("/v1/embeddings", json={"input": "a"}).status_code)
                assert client.get("/healthz").status_code == 200
        assert seen == [200, 503, 200]

    stuck = Stuck()
    serve_in_a_thread(tiny_folder("clip"), monkeypatch, use)


@pytest.mark.parametrize("ending", [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_the_command_answers_and_finishes_what_it_began(
    tiny_folder: Callable[[str], Path], tmp_path: Path, tiny_base: Callable[[str], Any], ending: signal.Signals
) -> None:
    if signal.getsignal(ending) is signal.SIG_IGN:
        pytest.skip("under nohup a server does not hear that the terminal has gone, and must not")
    (tmp_path / "pictures").mkdir()
    for name, color in (("red.png", (200, 0, 0)), ("blue.png", (0, 0, 200))):
        (tmp_path / "pictures" / name).write_bytes(png(color))
    embed(tmp_path / "pictures", tiny_base("clip"), tmp_path / "vectors")
    build_index(tmp_path / "vectors", tmp_path / "index")
    arguments = [
        str(tiny_folder("clip")), "--index", str(tmp_path / "index"), "--pictures", str(tmp_path / "pictures"),
        "--max-batch", "1", "--api-key-env", "A_KEY",
    ]  # fmt: skip
    with process(*arguments, A_KEY="key") as server, contextlib.closing(server.client()) as client:
        assert client.get("/v1/models").status_code == 401
        client.headers["authorization"] = "Bearer key"
        assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 421
        found = client.post("/v1/search", json={"image": data_uri(png((0, 0, 200))), "k": 1}).json()
        assert found["data"][0]["id"] == "blue.png"
        assert client.get("/v1/thumbnail", params={"id": "blue.png"}).headers["content-type"] == "image/jpeg"
        # One item a pass: a second of work on an idle machine, and well below the time-out on a busy one.
        answers: list[httpx.Response] = []
        texts = [f"text {number}" for number in range(300)]
        asking = threading.Thread(target=lambda: answers.append(client.post("/v1/embeddings", json={"input": texts})))
        asking.start()
        with contextlib.closing(server.client()) as other:
            other.headers["authorization"] = "Bearer key"
            while "trimtab_items_in_work 300" not in other.get("/metrics").text:
                assert asking.is_alive()
        server.popen.send_signal(ending)
        asking.join(60)
        assert server.end() == 0
    assert answers[0].status_code == 200
    vectors = np.array([one["embedding"] for one in answers[0].json()["data"]])
    np.testing.assert_allclose(vectors[:3], tiny_base("clip").encode_text(texts[:3]), atol=1e-6)
    said = "".join(server.lines)
    assert said.rstrip().endswith("stopped")
    assert "Traceback" not in said


def test_every_option_of_the_command_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("trimtab.serve.http.run.serve", lambda model, **rest: seen.update(rest, model=model))
    given = {
        "max_batch": 2, "max_wait_ms": 3.0, "queue": 9, "timeout": 7.0, "max_body_mib": 5.0, "max_inputs": 6,
        "max_megapixels": 1.5, "connections": 4,
    }  # fmt: skip
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    places = {"index": "i", "pictures": "p", "classes": "c.txt"}
    where = [part for name, value in places.items() for part in (f"--{name}", value)]
    others = {"host": "0.0.0.0", "port": 1234, "api_key_env": "KEY", "device": "cpu", "root_path": "/clip"}
    more = [part for name, value in others.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    hosts = ["--allow-host", "a.example", "--allow-host", "b.example"]
    assert CliRunner().invoke(app, ["serve", "m", *flags, *where, *more, "--allow-urls", *hosts]).exit_code == 0
    assert seen.pop("options") == ServeOptions(**given, allow_urls=True)
    seen.pop("tell")
    assert seen.pop("allow_hosts") == ["a.example", "b.example"]
    assert seen == {"model": "m", **{name: Path(value) for name, value in places.items()}, **others}
    assert CliRunner().invoke(app, ["serve", "m"]).exit_code == 0
    assert seen["options"] == ServeOptions()
    assert (seen["host"], seen["device"], seen["api_key_env"]) == ("127.0.0.1", "auto", None)


def test_limits_are_those_of_the_docs() -> None:
    options = ServeOptions()
    assert options.allow_urls is False, "pictures are never fetched unless asked for"
    page = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")
    told = {
        "--queue": options.queue, "--max-inputs": options.max_inputs, "--max-body-mib": options.max_body_mib,
        "--timeout": options.timeout, "--max-megapixels": options.max_megapixels, "--connections": options.connections,
    }  # fmt: skip
    for flag, value in told.items():
        assert re.search(rf"^\| `{flag}` \| {value:g}( s)? \|", page, re.MULTILINE), flag
    assert f"up to `--max-batch` items ({options.max_batch})" in page
    assert f"may have {options.max_text:,} characters" in page
    assert re.search(rf"may bring {options.max_classes}\b", page)
    assert options.max_buffered == 256 << 20
    assert ServeOptions(max_body_mib=100).max_buffered == 400 << 20


@pytest.mark.parametrize(
    ("host", "key", "warned"), [("0.0.0.0", None, True), ("0.0.0.0", "K", False), ("127.0.0.1", None, False)]
)
def test_a_server_for_everyone_without_a_key_is_warned_of(
    host: str, key: str | None, warned: bool, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("K", "a-key-of-some-length")
    monkeypatch.setattr("trimtab.serve.http.run._run", lambda server, listener: None)
    monkeypatch.setattr("trimtab.serve.http.run._log_to_stderr", lambda: None)
    with caplog.at_level("WARNING"):
        serve(str(tiny_folder("clip")), host=host, port=0, api_key_env=key, device="cpu", tell=lambda line: None)
    assert ("whoever reaches this machine" in caplog.text) == warned


def test_the_log_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("trimtab.serve", "uvicorn.error")
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in names}
    try:
        _log_to_stderr()
        logging.getLogger("trimtab.serve").warning("no picture of %s", "a\x1b[2Jb")
        assert "no picture of a\N{REPLACEMENT CHARACTER}[2Jb" in capsys.readouterr().err
    finally:
        for name, (handlers, propagate) in before.items():
            logging.getLogger(name).handlers[:] = handlers
            logging.getLogger(name).propagate = propagate
        logging.getLogger("trimtab.towers.dual_encoder").setLevel(logging.NOTSET)
